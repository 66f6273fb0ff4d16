// What a block of the decode kernel is made of: its threads, its shared memory, its rows.
#pragma once

#include <cstdint>

#include "decode.h"
#include "decode_tile.h"

namespace {
namespace longrope {

using longrope_calls::Scales;
using longrope_calls::TokenRows;
using longrope_cuda::kDecodeRows;
using longrope_cuda::kDecodeTile;
using longrope_cuda::Splits;

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
static_assert(kWarps * kKeys == kDecodeTile, "a tile of a block is one of each warp");

// Blocks of a multiprocessor at once.
template <int kDim>
constexpr int kBlocks = kDim == 64 ? 4 : kDim == 128 ? 3 : 2;

// What the host adds to the call.
struct DecodePlan {
  Splits splits;
  Divisor block_size;
  int32_t row_blocks;
  bool several_sets;  // queries of a sequence may differ in theirs: a block is for one of them
  bool keys_are_wide;    // rows of keys are whole pieces
  bool values_are_wide;
  float scale;  // scores to base 2; with softcap to twice the argument of tanh
  float cap;    // softcap to base 2
  int32_t window;  // 0: none
};

// Shared memory, in bytes: steps, queries, and what each warp has for itself, tiles that are staged
// and at the end its sums.
template <int kDim>
struct Shared {
  static constexpr int kSteps = 2 * kDim / 2 * 8;
  static constexpr int kQueries = kDecodeRows * kDim * 2;
  static constexpr int kOfWarp = kKeys * kDim * 2;
  static constexpr int kStates = kWarps * kDecodeRows * 8;
  static constexpr int kFrame = 32;
  static constexpr int kBytes = kSteps + kQueries + kWarps * kOfWarp + kStates + kFrame;
  static_assert(kDecodeRows * kDim * 4 == kOfWarp, "sums take the place of a staged tile");
};

// What all threads of a block know, in shared memory: registers are what limits the kernel.
struct Frame {
  int64_t n_hat;
  float factor;  // of tokens from n_hat on
  int32_t split;
  int32_t splits;
  int32_t first_row;
  uint32_t queries;  // those that take part, of which bit 0 is that of the first row
  uint32_t is_last;  // of the blocks of its rows
};
static_assert(sizeof(Frame) <= Shared<64>::kFrame, "its place");

// Of the eight lanes that hold the scores of a row.
__device__ __forceinline__ float largest_of_keys(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
}

__device__ __forceinline__ float sum_of_keys(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Who stands in a row of the block.
struct RowOf {
  int32_t query;
  int32_t head;
  bool exists;
};

__device__ __forceinline__ RowOf row_at(const DecodeCall& a, int32_t kv_head, int32_t row) {
  const int32_t groups = a.heads / a.kv_heads;
  return {row / groups, kv_head * groups + row % groups, row < groups * a.queries};
}

// Positions fit 32 bits.
__device__ __forceinline__ int32_t position_of_slot(const DecodeCall& a, int32_t sequence,
                                                    int32_t start, int32_t j) {
  const Integers& positions = a.keys.positions;
  return positions.data == nullptr ? j - start
                                   : static_cast<int32_t>(element(positions, sequence, j));
}

}  // namespace longrope
}  // namespace
