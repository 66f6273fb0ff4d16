// How the keys of a sequence are split between blocks.
//
// The host knows shapes only (`Splits`). Blocks read the lengths of the batch and derive from them
// the keys of a split, the same for all sequences, and from their own length which splits are live.
// So a captured graph serves all lengths.
#pragma once

#include <cmath>
#include <cstdint>

#include "decode.h"
#include "factor_sets.h"

namespace {
namespace longrope {

using longrope_calls::DecodeCall;
using longrope_cuda::kDecodeTile;
using longrope_cuda::Splits;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The keys that the queries of a sequence see, and how they are split.
struct KeyRange {
  int32_t low;     // the first
  int32_t high;    // past the last
  int32_t start;   // kv_start, at most high
  int32_t splits;  // live ones
  int32_t first;   // the first key of the first split, a multiple of the tile
  int32_t each;    // keys of a split, a multiple of the tile
};

__device__ __forceinline__ int32_t sum_of_lanes(int32_t x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// By all lanes of a warp.
__device__ __forceinline__ KeyRange keys_of_sequence(const DecodeCall& a, const Splits& splits,
                                                     int32_t window, int32_t sequence,
                                                     int32_t lane) {
  // Tiles of a split, were tiles divisible: those of the batch, by batch * even.
  int32_t tiles = 0;
  for (int32_t b = lane; b < a.batch; b += 32) {
    int32_t keys = static_cast<int32_t>(element(a.keys.lens, b));
    if (window > 0) keys = min(keys, window + a.queries - 1);
    tiles += (keys + kDecodeTile - 1) / kDecodeTile;
  }
  const int32_t shares = a.batch * splits.even;
  const int32_t share = max((sum_of_lanes(tiles) + shares - 1) / shares, splits.least_tiles);

  KeyRange r;
  r.high = static_cast<int32_t>(element(a.keys.lens, sequence));
  r.start = a.keys.start.data == nullptr
                ? 0
                : static_cast<int32_t>(min(max(element(a.keys.start, sequence), int64_t{0}),
                                           static_cast<int64_t>(r.high)));
  r.low = r.start;
  if (window > 0) r.low = max(r.low, r.high - a.queries - window + 1);
  r.low = min(r.low, r.high);
  r.first = r.low / kDecodeTile * kDecodeTile;
  const int32_t own = (r.high - r.first + kDecodeTile - 1) / kDecodeTile;
  const int32_t wanted = min(max((own + share / 2) / share, 1), splits.most);
  const int32_t each = max((own + wanted - 1) / wanted, 1);
  r.splits = max((own + each - 1) / each, 1);
  r.each = each * kDecodeTile;
  return r;
}

// Subtracting it from what is -infinity leaves that, also where all of a row is.
__device__ __forceinline__ float base_of(float top) { return top == -INFINITY ? 0.0f : top; }

// One row of the result, of a query and head, from those of its live splits; by all lanes of a
// warp.
template <typename T>
__device__ __forceinline__ void combine_row(const DecodeCall& a, const Splits& splits,
                                            int32_t count, int32_t sequence, int32_t head,
                                            int32_t query, int32_t lane) {
  const int64_t rows = static_cast<int64_t>(a.batch) * a.heads * a.queries;
  const int64_t row = (static_cast<int64_t>(sequence) * a.heads + head) * a.queries + query;
  const float* const lse = splits.lse + row;
  float top = -INFINITY;
  for (int32_t i = lane; i < count; i += 32) top = fmaxf(top, lse[i * rows]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  }
  float total = 0.0f;
  for (int32_t i = lane; i < count; i += 32) total += exp2_approx(lse[i * rows] - base_of(top));
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
  }
  const float divisor = total == 0.0f ? 1.0f : total;

  T* const out = static_cast<T*>(a.out.data) + sequence * a.out.strides[0] +
                 query * a.out.strides[1] + head * a.out.strides[2];
  for (int32_t d = lane; d < a.dim; d += 32) {
    float sum = 0.0f;
#pragma unroll 4
    for (int32_t i = 0; i < count; ++i) {
      sum += exp2_approx(lse[i * rows] - base_of(top)) *
             splits.out[(i * rows + row) * a.dim + d];
    }
    out[d].bits = static_cast<uint16_t>(pack<T>(sum / divisor, 0.0f));
  }
  if (lane == 0) a.lse[row] = (top + log2f(divisor)) * kLn2;
}

}  // namespace longrope
}  // namespace
