// A vector of float32 in AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "element.h"

namespace {
namespace longrope {

constexpr int kWidth = 16;
using Vec = __m512;

inline __m256i load_bits(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline __m512i round_to_bf16(Vec v) {  // in the upper halves of the lanes
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 unordered = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, unordered, _mm512_set1_epi32(0x7fc00000));
}

constexpr int kRowBlock = 4;  // queries that share a loaded key or value; fills the 32 registers

inline Vec splat(float value) { return _mm512_set1_ps(value); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(load_bits(p)); }
inline Vec load(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p)), 16));
}

inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(v), 16)));
}

// Elements 0, 2, 4, ... of 2 * kWidth go to even, the others to odd.
template <typename T>
inline void load_pairs(const T* p, Vec& even, Vec& odd) {
  const Vec low = load(p), high = load(p + kWidth);
  const __m512i index =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = _mm512_permutex2var_ps(low, index, high);
  odd = _mm512_permutex2var_ps(low, _mm512_add_epi32(index, _mm512_set1_epi32(1)), high);
}
inline void load_pairs(const BFloat16* p, Vec& even, Vec& odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}

template <typename T>
inline void store_pairs(T* p, Vec even, Vec odd) {
  const __m512i index =
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  store(p, _mm512_permutex2var_ps(even, index, odd));
  store(p + kWidth,
        _mm512_permutex2var_ps(even, _mm512_add_epi32(index, _mm512_set1_epi32(8)), odd));
}
inline void store_pairs(BFloat16* p, Vec even, Vec odd) {
  const __m512i low = _mm512_srli_epi32(round_to_bf16(even), 16);
  const __m512i high = _mm512_and_si512(round_to_bf16(odd), _mm512_set1_epi32(0xffff0000));
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
}

inline __m128 sum_of_quarters(Vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// p[i] = the sum of the lanes of v[i].
inline void store_sums(float* p, const Vec (&v)[4]) {
  const Vec a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const Vec b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const Vec sums = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  _mm_storeu_ps(p, sum_of_quarters(sums));
}

// Stores the columns of v, kWidth rows, `stride` apart.
inline void store_columns(float* p, int64_t stride, const Vec (&v)[kWidth]) {
  Vec pairs[kWidth], fours[kWidth];
  for (int i = 0; i < kWidth; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  // Of rows i to i + 3: column c in the first quarter, 4 + c in the second, ...
  for (int i = 0; i < kWidth; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const Vec a = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x44);
    const Vec b = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xee);
    const Vec d = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x44);
    const Vec e = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xee);
    _mm512_storeu_ps(p + c * stride, _mm512_shuffle_f32x4(a, d, 0x88));
    _mm512_storeu_ps(p + (4 + c) * stride, _mm512_shuffle_f32x4(a, d, 0xdd));
    _mm512_storeu_ps(p + (8 + c) * stride, _mm512_shuffle_f32x4(b, e, 0x88));
    _mm512_storeu_ps(p + (12 + c) * stride, _mm512_shuffle_f32x4(b, e, 0xdd));
  }
}

inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }

}  // namespace longrope
}  // namespace
