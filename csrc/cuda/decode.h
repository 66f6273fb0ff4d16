// Attention of a few queries to a cache of unrotated keys on the GPU: its arguments and its entry.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace longrope_cuda {

// Keys of a tile of a block, by which splits are counted.
constexpr int32_t kDecodeTile = 64;
// Rows that a block takes: queries of the heads that share a KV head.
constexpr int32_t kDecodeRows = 8;

// Splits of a sequence of mean length, of any sequence at most, and tiles of one at least; see
// longrope_kernels/backends/cuda/decode.py.
struct Splits {
  int32_t even;
  int32_t most;
  int32_t least_tiles;
};

// Strides are in elements; the last one of q, out, keys and values is 1.
struct DecodeArguments {
  ElementType type;        // of q and out: bfloat16 or float16
  bool caches_are_float8;  // else of that type too
  int32_t batch;
  int32_t queries;  // of a sequence; query t has slot cache_lens - queries + t
  int32_t heads;    // a multiple of kv_heads
  int32_t kv_heads;
  int32_t dim;  // 256 at most

  const void* q;  // (batch, queries, heads, dim)
  int64_t q_strides[3];
  void* out;  // like q
  int64_t out_strides[3];
  float* lse;  // (batch, heads, queries), contiguous

  const void* keys;  // (batch, capacity, kv_heads, dim), or (blocks, block_size, kv_heads, dim)
  int64_t key_strides[3];
  const void* values;  // like keys
  int64_t value_strides[3];
  const int32_t* block_table;  // (batch, max_blocks), or null: the caches are dense
  int64_t block_table_strides[2];
  int32_t block_size;
  const float* key_scale;  // (kv_heads,), or null for 1
  int64_t key_scale_stride;
  const float* value_scale;  // (kv_heads,), or null for 1
  int64_t value_scale_stride;

  Integers cache_lens;        // (batch,)
  Integers kv_start;          // (batch,), or nothing for 0
  const void* key_positions;  // (batch, slots) int64 or int32, or null for slot - kv_start
  bool key_positions_are_int64;
  int64_t key_position_strides[2];

  FactorSets factors;
  // Sets of (batch,); lengths of (batch, queries), whose stride there is 0 where a sequence has one.
  // Without either a query takes the set of the tokens up to it.
  Selection selection;
  int64_t length_stride;

  bool interleaved;
  float softmax_scale;
  int32_t window;  // 0: none
  float softcap;   // 0: none

  Splits splits;
  float* partial_out;  // (splits.most, batch, heads, queries, dim), or null where `most` is 1
  float* partial_lse;  // (splits.most, batch, heads, queries), to base 2
};

// Attends by one launch, or by two where keys are split; throws std::runtime_error where one fails.
void decode(const DecodeArguments& arguments, const Place& place);

// Those of one type each, compiled by themselves.
void decode_bfloat16(const DecodeArguments& arguments, void* stream);
void decode_float16(const DecodeArguments& arguments, void* stream);

}  // namespace longrope_cuda
