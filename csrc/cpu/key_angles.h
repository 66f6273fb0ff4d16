// The cosines and sines of keys, group by group; compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "../selection.h"
#include "scratch.h"

namespace {
namespace longrope {

constexpr int64_t kGroup = 4;  // keys that are rotated before they meet the queries

// From a group to the next, cosines and sines turn by kGroup positions in float64, whose rounding
// stays far below the last bit of a float32 however many groups a split has. Within a group they
// turn from its first key, in float64 again where keys are float32 and would show a rounding. Where
// positions jump they start anew, and so they do at the threshold, where the steps change.
template <typename T>
class KeyAngles {
 public:
  explicit KeyAngles(const Tables& tables)
      : tables_(tables),
        pairs_(tables.pairs),
        cos_(pairs_),
        sin_(pairs_),
        group_cos_(pairs_),
        group_sin_(pairs_),
        offset_cos_(kGroup * pairs_),
        offset_sin_(kGroup * pairs_) {}

  // Makes the next group start anew: what a split gives must not depend on the one before it.
  void forget() { next_ = kNowhere; }

  // Writes a * cos and a * sin of the keys at count <= kGroup positions; rows are `row` apart.
  void write(const int64_t* positions, int64_t count, int64_t set, float* cos, float* sin,
             int64_t row) {
    const int64_t n_hat = tables_.n_hat[set];
    bool together = below_threshold(positions[0], n_hat) ==
                    below_threshold(positions[count - 1], n_hat);
    for (int64_t j = 1; j < count; ++j) together = together && positions[j] == positions[0] + j;
    if (together) return write_group(positions[0], count, set, cos, sin, row);
    for (int64_t j = 0; j < count; ++j) {
      write_group(positions[j], 1, set, cos + j * row, sin + j * row, row);
    }
  }

 private:
  static constexpr int64_t kNowhere = std::numeric_limits<int64_t>::min();
  static constexpr bool kExact = std::is_same<T, float>::value;
  using Offset = std::conditional_t<kExact, double, float>;

  void write_group(int64_t position, int64_t count, int64_t set, float* cos, float* sin,
                   int64_t row) {
    const bool original = below_threshold(position, tables_.n_hat[set]);
    const uint64_t* const steps = tables_.steps + (2 * set + (original ? 0 : 1)) * pairs_;
    if (steps != steps_) set_steps(steps);
    if (position != next_) {
      const double factor = original ? 1.0 : tables_.attention_factor[set];
      cos_sin_row(position, factor, cos_.at(0), sin_.at(0));
    }
    for (int64_t i = 0; i < pairs_; ++i) cos[i] = static_cast<float>(*cos_.at(i));
    for (int64_t i = 0; i < pairs_; ++i) sin[i] = static_cast<float>(*sin_.at(i));
    for (int64_t j = 1; j < count; ++j) {
      const Offset* const c = offset_cos_.at(j * pairs_);
      const Offset* const s = offset_sin_.at(j * pairs_);
      if constexpr (kExact) {
        turn(cos_.at(0), sin_.at(0), c, s, cos + j * row, sin + j * row);
      } else {
        turn(cos, sin, c, s, cos + j * row, sin + j * row);
      }
    }
    turn(cos_.at(0), sin_.at(0), group_cos_.at(0), group_sin_.at(0), cos_.at(0), sin_.at(0));
    next_ = position + kGroup;
  }

  // Cosines and sines further by an angle; out may be in.
  template <typename In, typename Out>
  void turn(const In* cos, const In* sin, const In* by_cos, const In* by_sin, Out* out_cos,
            Out* out_sin) const {
#pragma omp simd
    for (int64_t i = 0; i < pairs_; ++i) {
      const In c = cos[i] * by_cos[i] - sin[i] * by_sin[i];
      const In s = sin[i] * by_cos[i] + cos[i] * by_sin[i];
      out_cos[i] = static_cast<Out>(c);
      out_sin[i] = static_cast<Out>(s);
    }
  }

  void set_steps(const uint64_t* steps) {
    steps_ = steps;
    next_ = kNowhere;
    cos_sin_row(kGroup, 1.0, group_cos_.at(0), group_sin_.at(0));
    for (int64_t j = 1; j < kGroup; ++j) {
      cos_sin_row(j, 1.0, offset_cos_.at(j * pairs_), offset_sin_.at(j * pairs_));
    }
  }

  template <typename Out>
  void cos_sin_row(int64_t position, double factor, Out* cos, Out* sin) const {
#pragma omp simd
    for (int64_t i = 0; i < pairs_; ++i) {
      const CosSin64 turn = cos_sin_64(static_cast<uint64_t>(position) * steps_[i]);
      cos[i] = static_cast<Out>(factor * turn.cos);
      sin[i] = static_cast<Out>(factor * turn.sin);
    }
  }

  const Tables& tables_;
  const int64_t pairs_;
  const uint64_t* steps_ = nullptr;
  int64_t next_ = kNowhere;     // the position that the next two are for
  Scratch<double> cos_;         // (pairs,), times a
  Scratch<double> sin_;         // (pairs,), times a
  Scratch<double> group_cos_;   // (pairs,), of kGroup positions
  Scratch<double> group_sin_;   // (pairs,)
  Scratch<Offset> offset_cos_;  // (kGroup, pairs), of j positions
  Scratch<Offset> offset_sin_;  // (kGroup, pairs)
};

}  // namespace longrope
}  // namespace
