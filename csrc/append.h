// Where new keys and values go in a cache, and their float8, for host and device alike.
#pragma once

#include <cstdint>
#include <cstring>

#include "selection.h"

namespace {
namespace longrope {

using longrope_calls::AppendCall;

// A slot of a row of the cache, or of a block; row -1 is none.
struct AppendPlace {
  int64_t row;
  int64_t slot;
};

LONGROPE_INLINE AppendPlace place_of_token(const AppendCall& a, int64_t batch, int64_t token) {
  const int64_t slots = a.cache.slots;
  if (a.slot_mapping.data != nullptr) {
    const int64_t address = element(a.slot_mapping, batch, token);
    if (address < 0) return {-1, 0};
    return {address / slots, address % slots};
  }
  const int64_t slot = element(a.cache.lens, batch) - a.tokens + token;
  if (slot < 0) return {-1, 0};
  if (a.cache.block_table.data == nullptr) return {batch, slot};
  // Of 32 bits, which a GPU divides faster.
  const uint32_t at = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(slots);
  return {element(a.cache.block_table, batch, at / size), at % size};
}

// A number of float8_e4m3fn, clamped to 448 and rounded to nearest even; NaN stays NaN.
LONGROPE_INLINE uint8_t float8_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  // 448 is 0x43e00000.
  const uint32_t rest = magnitude < 0x43e00000u ? magnitude : 0x43e00000u;
  const uint32_t normal = (rest - 0x3c000000u + 0x7ffffu + (rest >> 20 & 1u)) >> 20;
  // Adding 2^14 aligns a subnormal's last bit, 2^-9, with the float's, and rounds it on the way.
  float shifted;
  std::memcpy(&shifted, &rest, sizeof shifted);
  shifted += 16384.0f;
  uint32_t subnormal;
  std::memcpy(&subnormal, &shifted, sizeof subnormal);
  subnormal -= 0x46800000u;
  return static_cast<uint8_t>(sign | (rest < 0x3c800000u ? subnormal : normal));
}

}  // namespace longrope
}  // namespace
