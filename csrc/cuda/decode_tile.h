// How the keys and values of a tile come from the cache to the registers of a warp, in the order in
// which the matrix unit wants them, and how keys are rotated there.
//
// A warp takes 16 keys. With n = lane / 4 and c = lane % 4, a lane holds
//   of keys n and n + 8: the chunks c, c + 4, c + 8, ... of 16 dimensions, each as two words of
//   four
//     registers, so that both dimensions of a pair are in one lane (`dimension_of`). Which
//     dimension stands where is of no consequence for a product: those of the queries stand alike.
//   of values 2 c, 2 c + 1, 2 c + 8 and 2 c + 9: dimensions 8 n to 8 n + 7, and so on in steps of
//   64.
// Either way 16 bytes are loaded at a time, without shared memory and without a shuffle.
#pragma once

#include <cstdint>

#include "decode.h"
#include "factor_sets.h"

namespace {
namespace longrope {

using longrope_calls::DecodeCall;

constexpr int kKeys = 16;  // of a warp's tile

// The lower and the upper halves of two registers.
constexpr uint32_t kLowHalves = 0x5410u, kHighHalves = 0x7632u;

// ------------------------------------------------------------------------------------ the elements

// Eight elements of a cache, as they lie there.
template <bool kFloat8>
using Raw = Words<kFloat8 ? 2 : 4>;

struct Float8 {
  uint8_t bits;  // e4m3fn
};

template <int kCount>
__device__ __forceinline__ Words<kCount> no_words() {
  Words<kCount> x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x.at[i] = 0;
  return x;
}

template <typename T>
__device__ __forceinline__ Words<4> elements_of(const Words<4>& x) {
  return x;
}

// float8 to T, exactly: shifted by one bit, e4m3 is a float16 of 2^-8 of its size.
template <typename T>
__device__ __forceinline__ Words<4> elements_of(const Words<2>& x) {
  Words<4> y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = permute_bytes(x.at[i / 2], 0, i % 2 == 0 ? 0x1404u : 0x3424u);
    float2 values = unpack<Float16>((two & 0x80008000u) | ((two & 0x7f007f00u) >> 1));
    values.x *= 256.0f;
    values.y *= 256.0f;
    // 480 is no number of e4m3fn: its code means NaN.
    if (fabsf(values.x) > 448.0f) values.x = __uint_as_float(0x7fc00000u);
    if (fabsf(values.y) > 448.0f) values.y = __uint_as_float(0x7fc00000u);
    y.at[i] = pack<T>(values.x, values.y);
  }
  return y;
}

// ------------------------------------------------------------------------------------------ chunks

// The dimension of a head at place i of 16 in a chunk, or -1. In the half pairing places 0 to 7 are
// the first dimensions of eight pairs, 8 to 15 the second; what is not rotated fills the places
// that are left. Interleaved, dimensions are in order.
__device__ __forceinline__ int32_t dimension_of(const DecodeCall& a, int32_t chunk,
                                                int32_t i) {
  const int32_t pairs = static_cast<int32_t>(a.tables.pairs);
  int32_t dimension = 16 * chunk + i;
  if (!a.tables.interleaved) {
    const int32_t pair = 8 * chunk + i % 8;
    const int32_t last = pairs % 8;  // pairs of a chunk that is not full
    if (pair < pairs) {
      dimension = i < 8 ? pair : pairs + pair;
    } else if (last != 0 && chunk == pairs / 8) {
      dimension = 2 * pairs + (i < 8 ? 0 : 8 - last) + i % 8 - last;
    }
    // A chunk of the rest: as many dimensions lie before it as places.
  }
  return dimension < a.dim ? dimension : -1;
}

// Interleaved pairs apart: x and y then hold the first and the second dimensions of eight pairs.
__device__ __forceinline__ void part_pairs(Words<4>& x, Words<4>& y) {
  const Words<4> a = x, b = y;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x.at[i] = permute_bytes(a.at[2 * i], a.at[2 * i + 1], kLowHalves);
    y.at[i] = permute_bytes(a.at[2 * i], a.at[2 * i + 1], kHighHalves);
    x.at[i + 2] = permute_bytes(b.at[2 * i], b.at[2 * i + 1], kLowHalves);
    y.at[i + 2] = permute_bytes(b.at[2 * i], b.at[2 * i + 1], kHighHalves);
  }
}

// Where the step of a pair lies in shared memory: a lane reads two of its steps at once, and the
// four lanes that read together read 64 bytes in a row.
__device__ __forceinline__ int32_t place_of_step(int32_t pair) {
  const int32_t chunk = pair / 8, i = pair % 8;
  return ((chunk / 4 * 4 + i / 2) * 4 + chunk % 4) * 2 + i % 2;
}

__device__ __forceinline__ CosSin cos_sin_of_phase(uint32_t phase) {
  const float angle = static_cast<float>(static_cast<int32_t>(phase)) * 1.4629180792671596e-9f;
  return {cos_approx(angle), sin_approx(angle)};
}

// Turns the pairs of a chunk, in place. steps: those of its first two pairs, in shared memory;
// `rotated` of the eight pairs are pairs.
template <typename T>
__device__ __forceinline__ void rotate_chunk(Words<4>& x, Words<4>& y, int64_t n, float factor,
                                             const Words<4>* steps, int32_t rotated) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Words<4> both = steps[4 * i];
    float2 first = unpack<T>(x.at[i]), second = unpack<T>(y.at[i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint64_t step =
          both.at[2 * j] | static_cast<uint64_t>(both.at[2 * j + 1]) << 32;
      const CosSin turn = cos_sin_of_phase(phase(n, step));
      // What is no pair has step 0: cosine 1 and sine 0.
      const float a = 2 * i + j < rotated ? factor : 1.0f;
      const float cos = a * turn.cos, sin = a * turn.sin;
      float& x_i = j == 0 ? first.x : first.y;
      float& x_j = j == 0 ? second.x : second.y;
      const float turned = x_i * cos - x_j * sin;
      x_j = x_i * sin + x_j * cos;
      x_i = turned;
    }
    x.at[i] = pack<T>(first.x, first.y);
    y.at[i] = pack<T>(second.x, second.y);
  }
}

// ------------------------------------------------------------------------------------------- slots

// Division by a number that the host knows, for dividends below 2^31.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, multiplier) + n) >> shift;
  }
};

// The block of a key, and its slot there; of a dense cache, the sequence and the key.
struct Slot {
  int32_t block;
  int32_t slot;
};

// Of keys j0 + lane % 16, for lanes to ask each other. Only keys from low to end have one: the
// other entries of the table may hold anything.
__device__ __forceinline__ Slot slot_of_lane(const DecodeCall& a, const Divisor& block_size,
                                             int32_t sequence, int32_t j0, int32_t low,
                                             int32_t end, int32_t lane) {
  const int32_t j = j0 + lane % kKeys;
  if (a.keys.block_table.data == nullptr) return {sequence, j};
  if (j < low || j >= end) return {0, 0};
  const uint32_t block = block_size.quotient(static_cast<uint32_t>(j));
  return {static_cast<int32_t>(element(a.keys.block_table, sequence, block)),
          j - static_cast<int32_t>(block * block_size.divisor)};
}

// Where the head of a cache begins in the slot that lane `key` knows.
template <typename Element>
__device__ __forceinline__ const Element* row_of_key(const Element* head,
                                                     const int64_t (&strides)[3],
                                                     const Slot& slots, int32_t key) {
  const int64_t block = __shfl_sync(kAllLanes, slots.block, key);
  const int64_t slot = __shfl_sync(kAllLanes, slots.slot, key);
  return head + block * strides[0] + slot * strides[1];
}

// Copies a tile element by element to shared memory, in rows of kDim elements whose place i holds
// dimension(i), zeros where there is none or no key. For rows that are not whole pieces of 16
// bytes.
template <int kDim, typename Element, typename Dimension>
__device__ __forceinline__ void stage_tile(Element* tile, const Element* head,
                                           const int64_t (&strides)[3], const Slot& slots,
                                           int32_t j0, int32_t low, int32_t end, int32_t lane,
                                           const Dimension& dimension) {
  __syncwarp();
#pragma unroll 1
  for (int32_t key = 0; key < kKeys; ++key) {
    const Element* const row = row_of_key(head, strides, slots, key);
    const bool exists = j0 + key >= low && j0 + key < end;
#pragma unroll 1
    for (int32_t i = lane; i < kDim; i += 32) {
      const int32_t d = dimension(i);
      Element x;
      x.bits = 0;
      if (exists && d >= 0) x = row[d];
      tile[key * kDim + i] = x;
    }
  }
  __syncwarp();
}

}  // namespace longrope
}  // namespace
