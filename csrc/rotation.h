// The rotation's building blocks, for host and device alike.
//
// An angle is kept in turns, as a 64-bit fixed-point fraction: with
// step = round(2^64 * frequency / (2 pi)), the phase of token n is n * step mod 2^64. Integer
// wraparound is the range reduction, and it is exact.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LONGROPE_INLINE __host__ __device__ __forceinline__
#else
#define LONGROPE_INLINE inline
#endif

// Internal linkage: the file is compiled once per instruction set, and the linker must not let
// one of them stand for another.
namespace {
namespace longrope {

// The phase of token n in 2^-32 turns, its rounding error at most 2^-32 turns (1.5e-9 rad).
LONGROPE_INLINE uint32_t phase(int64_t n, uint64_t step) {
  return static_cast<uint32_t>((static_cast<uint64_t>(n) * step) >> 32);
}

template <typename Real>
struct CosSinOf {
  Real cos;
  Real sin;
};
using CosSin = CosSinOf<float>;
using CosSin64 = CosSinOf<double>;

// Those of an angle so many quarter turns beyond one whose cosine and sine are c and s.
template <typename Real, typename Unsigned>
LONGROPE_INLINE CosSinOf<Real> beyond_quarters(Unsigned quarters, Real c, Real s) {
  const bool odd = quarters & 1u;
  const Real cos = odd ? s : c;
  const Real sin = odd ? c : s;
  // cos is negative in quarters 1 and 2, sin in 2 and 3.
  return {((quarters + 1u) & 2u) ? -cos : cos, (quarters & 2u) ? -sin : sin};
}

// Cosine and sine of a phase in 2^-32 turns, each within 1.2e-7.
//
// The nearest quarter turn comes off in integers, exactly; what is left lies in [-pi/4, pi/4],
// where the polynomials (Cephes' coefficients for float) are good to the last bit of a float32.
LONGROPE_INLINE CosSin cos_sin(uint32_t phase) {
  const uint32_t quarter = (phase + 0x20000000u) >> 30;
  const float r = static_cast<float>(static_cast<int32_t>(phase - (quarter << 30))) *
                  1.4629180792671596e-9f;  // 2 pi / 2^32
  const float r2 = r * r;
  const float s =
      r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f + r2 * -1.9515295891e-4f));
  const float c = 1.0f - 0.5f * r2 +
                  r2 * r2 *
                      (4.166664568298827e-2f +
                       r2 * (-1.388731625493765e-3f + r2 * 2.443315711809948e-5f));
  return beyond_quarters(quarter, c, s);
}

// Cosine and sine of a phase in 2^-64 turns, each within 3e-16; as above (Cephes' for double).
LONGROPE_INLINE CosSin64 cos_sin_64(uint64_t phase) {
  const uint64_t quarter = (phase + 0x2000000000000000u) >> 62;
  const double r = static_cast<double>(static_cast<int64_t>(phase - (quarter << 62))) *
                   3.4061215800865546e-19;  // 2 pi / 2^64
  const double r2 = r * r;
  const double s =
      r +
      r * r2 *
          (-1.66666666666666307295e-1 +
           r2 * (8.33333333332211858878e-3 +
                 r2 * (-1.98412698295895385996e-4 +
                       r2 * (2.75573136213857245213e-6 +
                             r2 * (-2.50507477628578072866e-8 +
                                   r2 * 1.58962301576546568060e-10)))));
  const double c =
      1.0 - 0.5 * r2 +
      r2 * r2 *
          (4.16666666666665929218e-2 +
           r2 * (-1.38888888888730564116e-3 +
                 r2 * (2.48015872888517045348e-5 +
                       r2 * (-2.75573141792967388112e-7 +
                             r2 * (2.08757008419747316778e-9 +
                                   r2 * -1.13585365213876817300e-11)))));
  return beyond_quarters(quarter, c, s);
}

// Whether the token at position n keeps the original embedding; with n_hat 0 none does.
LONGROPE_INLINE bool below_threshold(int64_t n, int64_t n_hat) { return n_hat > 0 && n < n_hat; }

// The factor set of a sequence: the first whose max_length is not below its length, else the last.
LONGROPE_INLINE int64_t set_of_length(int64_t length, const int64_t* max_length, int64_t sets) {
  int64_t set = 0;
  while (set < sets - 1 && length > max_length[set]) ++set;
  return set;
}

}  // namespace longrope
}  // namespace
