// The two 16-bit floats as bits, converted with integer arithmetic alone, so that any compiler can
// vectorise the loops around them. Loads widen exactly, stores round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __FAST_MATH__
#error "longrope: built without -ffast-math and -Ofast, which fold away what rounds exactly"
#endif

namespace {
namespace longrope {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Two of them, the first in the lower half, for instructions that multiply both with two others.
struct Pair {
  uint32_t bits;
};

// Whether the instruction set has such products of a type, in sums of float32.
template <typename T>
constexpr bool kMultipliesPairs = false;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // Moving the exponent's bias by a multiplication also normalises the subnormals.
  const uint32_t finite = bits_of(float_of(rest) * float_of(0x77800000u));  // 2^112
  const uint32_t special = rest | 0x7f800000u;
  return float_of(sign | (rest >= 0x0f800000u ? special : finite));
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void narrow(float value, Float16* out) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t rest = bits_of(value) & 0x7fffffffu;
  const uint32_t normal = (rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a subnormal's last bit with the float's, and rounds it on the way.
  const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
  uint32_t magnitude = rest < 0x38800000u ? subnormal : normal;
  magnitude = rest >= 0x47800000u ? 0x7c00u : magnitude;  // 2^16 and above: infinity
  magnitude = rest > 0x7f800000u ? 0x7e00u : magnitude;
  out->bits = static_cast<uint16_t>(sign | magnitude);
}

}  // namespace longrope
}  // namespace
