// AVX-512 with products of pairs of bfloat16 (BF16), twice the rate of float32.
#pragma once

#include "vector_avx512.h"

namespace {
namespace longrope {

template <>
constexpr bool kMultipliesPairs<BFloat16> = true;

using PairVec = __m512bh;

inline PairVec load(const Pair* p) { return (PairVec)_mm512_loadu_si512(p); }
inline PairVec splat(Pair value) {
  return (PairVec)_mm512_set1_epi32(static_cast<int>(value.bits));
}

// Rounds two vectors to nearest even; element i of each makes pair i.
inline void store_rounded(Pair* p, Vec first, Vec second) {
  const __m512i in_order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
      23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(in_order, halves));
}

// c + the products of both elements.
inline Vec multiply_add(PairVec a, PairVec b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }

}  // namespace longrope
}  // namespace
