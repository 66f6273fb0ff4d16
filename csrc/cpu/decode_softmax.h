// exp2 and tanh in plain C++ that any compiler vectorises, and the online softmax of a tile.
#pragma once

#include <cstdint>
#include <limits>

#include "element.h"

namespace {
namespace longrope {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kLog2E = 1.4426950408889634;

constexpr int64_t kTile = 64;  // keys between two updates of a row's maximum
constexpr int64_t kShortTile = 16;  // of which no more need be looked at where there are so few

// 2^x within 1e-7 of itself for x <= 0 (Cephes' coefficients); 0 below 2^-126. NaN stays NaN.
inline float exp2_of(float x) {
  const float clamped = x < -126.0f ? -126.0f : x;
  const float shifted = clamped + 12582912.0f;  // 1.5 * 2^23 leaves round(x) in the low bits
  const float r = clamped - (shifted - 12582912.0f);
  const float poly =
      1.0f +
      r * (6.931472028550421e-1f +
           r * (2.402264791363012e-1f +
                r * (5.550332471162809e-2f +
                     r * (9.618437357674640e-3f +
                          r * (1.339887440266574e-3f + r * 1.535336188319500e-4f)))));
  const float scaled = poly * float_of((bits_of(shifted) << 23) + 0x3f800000u);
  return x < -126.0f ? 0.0f : scaled;
}

// tanh within 2e-7 of itself (Cephes' coefficients near 0).
inline float tanh_of(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float x2 = x * x;
  const float near =
      x + x * x2 *
              (-3.33332819422e-1f +
               x2 * (1.33314422036e-1f +
                     x2 * (-5.37397155531e-2f +
                           x2 * (2.06390887954e-2f + x2 * -5.70498872745e-3f))));
  const float e = exp2_of(magnitude * static_cast<float>(-2.0 * kLog2E));
  const float far = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? near : (x < 0.0f ? -far : far);
}

// scores = tanh(scale * scores), for kCount keys of one row.
template <int64_t kCount>
inline void cap_scores(float* scores, float scale) {
#pragma omp simd
  for (int64_t j = 0; j < kCount; ++j) scores[j] = tanh_of(scale * scores[j]);
}

// The running maximum and sum of a row of scores s: its weights are 2^(scale * (s - top)). The
// difference comes first: of two products one may be rounded and the other fused into it, and a
// large maximum then is not as large as itself.
struct Softmax {
  float top;    // -inf before the first key
  float total;  // of the weights
};

inline float finite(float top) { return top == -kInfinity ? 0.0f : top; }

// Turns the scores of kCount keys into weights and returns what earlier weights must be multiplied
// by.
template <int64_t kCount>
inline float update_softmax(float* scores, float scale, Softmax& state) {
  float top = state.top;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < kCount; ++j) top = scores[j] > top ? scores[j] : top;
  const float base = finite(top);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < kCount; ++j) {
    const float weight = exp2_of((scores[j] - base) * scale);
    scores[j] = weight;
    total += weight;
  }
  const float rescale = exp2_of((state.top - base) * scale);
  state.top = top;
  state.total = state.total * rescale + total;
  return rescale;
}

}  // namespace longrope
}  // namespace
