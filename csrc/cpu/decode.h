// Attention of a few queries to a cache of unrotated keys on the CPU: its arguments and entries.
#pragma once

#include <array>
#include <cstdint>

#include "element_type.h"

namespace longrope_cpu {

// Strides are in elements; the last one of q, out, keys and values is 1.
struct DecodeArguments {
  ElementType type;  // of q, out, keys and values
  int64_t batch;
  int64_t queries;   // of a sequence; query t has slot cache_lens - queries + t
  int64_t heads;     // a multiple of kv_heads
  int64_t kv_heads;
  int64_t dim;
  int64_t pairs;

  const void* q;  // (batch, queries, heads, dim)
  std::array<int64_t, 3> q_strides;
  void* out;  // like q
  std::array<int64_t, 3> out_strides;
  float* lse;  // (batch, heads, queries), contiguous

  const void* keys;  // (batch, capacity, kv_heads, dim), or (blocks, block_size, kv_heads, dim)
  std::array<int64_t, 3> key_strides;
  const void* values;  // like keys
  std::array<int64_t, 3> value_strides;
  const int32_t* block_table;  // (batch, max_blocks), or null: the caches are dense
  std::array<int64_t, 2> block_table_strides;
  int64_t block_size;

  const int64_t* cache_lens;  // (batch,)
  const int64_t* kv_start;    // (batch,), or null for 0
  const void* key_positions;  // (batch, slots) int64 or int32, or null for slot - kv_start
  bool key_positions_are_int64;
  std::array<int64_t, 2> key_position_strides;

  int64_t sets;                    // the number of factor sets
  const uint64_t* steps;           // (sets, 2, pairs); row 0 below n_hat
  const int64_t* n_hat;            // (sets,)
  const double* attention_factor;  // (sets,)
  const int64_t* max_length;       // (sets,)
  const int64_t* lengths;          // (batch,), (batch, queries), or null: that of each query itself
  bool lengths_are_of_queries;
  const int64_t* chosen_sets;      // (batch,) or null; wins over lengths

  bool interleaved;
  double softmax_scale;
  int64_t window;  // 0: none
  double softcap;  // 0: none
  int threads;     // the result does not depend on it
};

using DecodeFunction = void (*)(const DecodeArguments&);

void decode_baseline(const DecodeArguments& arguments);
void decode_avx2(const DecodeArguments& arguments);
void decode_avx512(const DecodeArguments& arguments);

}  // namespace longrope_cpu
