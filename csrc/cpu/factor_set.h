// The cosines and sines of a token under a factor set; compiled once for
// each instruction set, over the vector type included before it.
#pragma once

#include <algorithm>

#include "../selection.h"

namespace {
namespace longrope {

inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// a * cos and a * sin of the token at position n, for all pairs.
inline void cos_sin_row(const Tables& tables, int64_t n, int64_t set, bool conjugate, float* cos,
                        float* sin) {
  const bool original = below_threshold(n, tables.n_hat[set]);
  const int64_t pairs = tables.pairs;
  const uint64_t* steps = tables.steps + (2 * set + (original ? 0 : 1)) * pairs;
  // In two parts: the rounding of a alone would shift all scores the same way.
  const double factor = original ? 1.0 : tables.attention_factor[set];
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
