// A vector of float32 in AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include "element.h"

namespace {
namespace longrope {

constexpr int kWidth = 8;
using Vec = __m256;

inline __m128i load_bits(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

inline __m256i round_to_bf16(Vec v) {  // in the upper halves of the lanes
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), unordered);
}

constexpr int kRowBlock = 2;  // queries that share a loaded key or value; fills the 16 registers

inline Vec splat(float value) { return _mm256_set1_ps(value); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(load_bits(p)); }
inline Vec load(const BFloat16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p)), 16));
}

inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_srli_epi32(round_to_bf16(v), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

// Elements 0, 2, 4, ... of 2 * kWidth go to even, the others to odd.
template <typename T>
inline void load_pairs(const T* p, Vec& even, Vec& odd) {
  const Vec low = load(p), high = load(p + kWidth);
  const Vec a = _mm256_permute2f128_ps(low, high, 0x20);
  const Vec b = _mm256_permute2f128_ps(low, high, 0x31);
  even = _mm256_shuffle_ps(a, b, 0x88);
  odd = _mm256_shuffle_ps(a, b, 0xdd);
}
inline void load_pairs(const BFloat16* p, Vec& even, Vec& odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000)));
}

template <typename T>
inline void store_pairs(T* p, Vec even, Vec odd) {
  const Vec a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
  store(p, _mm256_permute2f128_ps(a, b, 0x20));
  store(p + kWidth, _mm256_permute2f128_ps(a, b, 0x31));
}
inline void store_pairs(BFloat16* p, Vec even, Vec odd) {
  const __m256i low = _mm256_srli_epi32(round_to_bf16(even), 16);
  const __m256i high = _mm256_and_si256(round_to_bf16(odd), _mm256_set1_epi32(0xffff0000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, high));
}

// p[i] = the sum of the lanes of v[i].
inline void store_sums(float* p, const Vec (&v)[4]) {
  const Vec a = _mm256_hadd_ps(v[0], v[1]), b = _mm256_hadd_ps(v[2], v[3]);
  const Vec sums = _mm256_hadd_ps(a, b);
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// Stores the columns of v, kWidth rows, `stride` apart.
inline void store_columns(float* p, int64_t stride, const Vec (&v)[kWidth]) {
  Vec pairs[kWidth], fours[kWidth];
  for (int i = 0; i < kWidth; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  // Of rows i to i + 3: column c in the first half, 4 + c in the second.
  for (int i = 0; i < kWidth; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(p + c * stride, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20));
    _mm256_storeu_ps(p + (4 + c) * stride, _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31));
  }
}

inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec multiply_subtract(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }

}  // namespace longrope
}  // namespace
