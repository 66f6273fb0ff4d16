// The products of a tile of keys with many queries, and of its values with their weights, by
// instructions that multiply pairs of bfloat16 and sum in float32. Rotated queries and keys and the
// weights are rounded to bfloat16 for them, as on a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decode_tile.h"

namespace {
namespace longrope {

constexpr int64_t kTilePairs = kTile / 2;

// A vector of pairs is made of two vectors that follow each other in a row, the last one beside
// zeros where their number is odd: lane l has element l of both. So are the keys of a tile paired
// for their values. The type of a pair is a parameter, since most instruction sets have none.
template <typename Pairs>
class PairTile {
 public:
  // `rows`: of all queries and heads; 0 where nothing will be multiplied.
  PairTile(const Layout& layout, int64_t rows, int64_t group_rows)
      : layout_(layout),
        width_(round_up((layout.padded + 1) / 2)),
        queries_(rows * width_),
        keys_(rows > 0 ? kTile * width_ : 0),
        columns_(rows > 0 ? kTile * width_ : 0),
        weights_(group_rows * kTilePairs),
        widened_(rows > 0 ? 2 * layout.values : 0),
        values_(rows > 0 ? kTilePairs * layout.values : 0) {
    for (int64_t i = 0; rows > 0 && i < width_; ++i) column_rows_.push_back(columns_.at(i * kTile));
    for (int64_t i = 0; i < kTilePairs; ++i) value_rows_[i] = values_.at(i * layout.values);
  }

  // The rotated queries of a part, (count, padded).
  void take_queries(const float* rows, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      pair_row(rows + r * layout_.padded, layout_.padded, queries_.at(r * width_));
    }
  }

  // The rotated keys of a KV head, (kTile, padded).
  void take_keys(const float* rows) {
    for (int64_t j = 0; j < kTile; ++j) {
      pair_row(rows + j * layout_.padded, layout_.padded, keys_.at(j * width_));
    }
    // A pair is as wide as a float32, and moves as one.
    transpose_tile(reinterpret_cast<const float*>(keys_.at(0)), width_,
                   reinterpret_cast<float*>(columns_.at(0)));
  }

  // The scores (count, kTile) of the queries from row `first` on.
  void score(int64_t first, int64_t count, float* scores) {
    std::fill(scores, scores + count * kTile, 0.0f);
    add_rows(column_rows_.data(), 0, 0, width_, queries_.at(first * width_), width_, count, scores,
             kTile);
  }

  // The values of a KV head, `count` rows of `dim` from `offset` on.
  template <typename T>
  void take_values(const T* const* values, int64_t offset, int64_t count, int64_t dim) {
    const int64_t width = layout_.values;
    for (int64_t pair = 0; pair < kTilePairs; ++pair) {
      const int64_t first = pair / kWidth * 2 * kWidth + pair % kWidth;
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t j = first + half * kWidth;
        float* const row = widened_.at(half * width);
        if (j < count) {
          widen_row(values[j] + offset, dim, row);
        } else {
          std::fill(row, row + width, 0.0f);  // whose weight is 0, and 0 times NaN is NaN
        }
      }
      for (int64_t c = 0; c < width; c += kWidth) {
        store_rounded(values_.at(pair * width + c), load(widened_.at(c)),
                      load(widened_.at(width + c)));
      }
    }
  }

  // Adds them to sums (count, values) by weights (count, kTile).
  void add_values(const float* weights, int64_t count, float* sums) {
    for (int64_t r = 0; r < count; ++r) {
      pair_row(weights + r * kTile, kTile, weights_.at(r * kTilePairs));
    }
    add_rows(value_rows_, 0, 0, kTilePairs, weights_.at(0), kTilePairs, count, sums,
             layout_.values);
  }

 private:
  // `count` elements, whole vectors.
  static void pair_row(const float* in, int64_t count, Pairs* out) {
    for (int64_t i = 0; i < count; i += 2 * kWidth) {
      const bool alone = i + kWidth == count;
      store_rounded(out + i / 2, load(in + i), alone ? splat(0.0f) : load(in + i + kWidth));
    }
  }

  const Layout layout_;
  const int64_t width_;    // pairs of a padded row
  Scratch<Pairs> queries_;  // (rows, width)
  Scratch<Pairs> keys_;     // (kTile, width)
  Scratch<Pairs> columns_;  // (width, kTile)
  Scratch<Pairs> weights_;  // (group rows, kTilePairs)
  Floats widened_;          // (2, values)
  Scratch<Pairs> values_;   // (kTilePairs, values)
  std::vector<const Pairs*> column_rows_;
  const Pairs* value_rows_[kTilePairs];
};

// Of types without such products nothing is made.
struct NoTile {
  NoTile(const Layout&, int64_t, int64_t) {}
};

}  // namespace longrope
}  // namespace
