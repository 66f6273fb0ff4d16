// The factor set of a sequence, and the cosines and sines of a token under it; compiled once for
// each instruction set, over the vector type included before it.
#pragma once

#include <algorithm>

#include "../rotation.h"

namespace {
namespace longrope {

inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// The factor set of a sequence. Arguments is RotaryArguments or DecodeArguments.
template <typename Arguments>
inline int64_t set_of_sequence(const Arguments& a, int64_t sequence) {
  if (a.chosen_sets != nullptr) {
    return std::min(std::max<int64_t>(a.chosen_sets[sequence], 0), a.sets - 1);
  }
  return a.lengths == nullptr ? 0 : set_of_length(a.lengths[sequence], a.max_length, a.sets);
}

// a * cos and a * sin of the token at position n, for all pairs.
template <typename Arguments>
inline void cos_sin_row(const Arguments& a, int64_t n, int64_t set, bool conjugate, float* cos,
                        float* sin) {
  const bool original = below_threshold(n, a.n_hat[set]);
  const int64_t pairs = a.pairs;
  const uint64_t* steps = a.steps + (2 * set + (original ? 0 : 1)) * pairs;
  // In two parts: the rounding of a alone would shift all scores the same way.
  const double factor = original ? 1.0 : a.attention_factor[set];
  const float high = static_cast<float>(factor);
  const float low = static_cast<float>(factor - static_cast<double>(high));
  const float sign = conjugate ? -1.0f : 1.0f;
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const CosSin turn = cos_sin(phase(n, steps[i]));
    const float sine = sign * turn.sin;
    cos[i] = high * turn.cos + low * turn.cos;
    sin[i] = high * sine + low * sine;
  }
}

}  // namespace longrope
}  // namespace
