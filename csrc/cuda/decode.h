// Attention of a few queries to a cache of unrotated keys on the GPU: its entry.
#pragma once

#include <cstdint>

#include "../records.h"
#include "place.h"

namespace longrope_cuda {

using longrope_calls::DecodeCall;

// Keys of a tile of a block, by which splits are counted.
constexpr int32_t kDecodeTile = 64;
// Rows that a block takes: queries of the heads that share a KV head.
constexpr int32_t kDecodeRows = 8;

// Splits of a sequence of mean length, of any sequence at most, and tiles of one at least, as
// longrope_kernels/backends/cuda/decode.py chooses them; and what they leave to be combined.
struct Splits {
  int32_t even;
  int32_t most;
  int32_t least_tiles;
  float* out;  // (most, batch, heads, queries, dim), or null where `most` is 1
  float* lse;  // (most, batch, heads, queries), to base 2
  // Zeros in which the blocks of the same rows count themselves, one for each of these and each
  // factor set, so that the last one combines and leaves a zero; null where `most` is 1.
  int32_t* counters;
};

// Attends by one launch; throws std::runtime_error where one fails.
// q is bfloat16 or float16; dim is at most 256.
void decode(const DecodeCall& call, const Splits& splits, const Place& place);

// Those of one type each, compiled by themselves.
void decode_bfloat16(const DecodeCall& call, const Splits& splits, void* stream);
void decode_float16(const DecodeCall& call, const Splits& splits, void* stream);

}  // namespace longrope_cuda
