// How the keys of a sequence are split between blocks.
//
// The host knows shapes only (`Splits`). Blocks read the lengths of the batch and derive from them
// the keys of a split, the same for all sequences, and from their own length which splits are live.
// So a captured graph serves all lengths.
#pragma once

#include <cstdint>

#include "decode.h"
#include "factor_sets.h"

namespace {
namespace longrope {

using longrope_calls::DecodeCall;
using longrope_cuda::kDecodeTile;
using longrope_cuda::Splits;

// The keys that the queries of a sequence see, and how they are split.
struct KeyRange {
  int32_t low;     // the first
  int32_t high;    // past the last
  int32_t start;   // kv_start
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
                : static_cast<int32_t>(element(a.keys.start, sequence));
  r.low = max(r.start, 0);
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

}  // namespace longrope
}  // namespace
