// Attention of many queries (prefill) on the GPU: its arguments and its entry.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace longrope_cuda {

// (batch, tokens, heads, dim) with a unit last stride. Addresses and strides are multiples of 16
// bytes.
struct TokenRows {
  const void* data;
  int64_t strides[3];  // batch, token, head; in elements
};

struct AttentionArguments {
  ElementType type;  // of q, k, v and out: bfloat16 or float16
  int64_t batch;     // 1 where sequences are packed
  int64_t queries;   // of a batch row
  int64_t keys;      // of a batch row
  int64_t heads;     // a multiple of kv_heads
  int64_t kv_heads;
  int64_t dim;  // a multiple of 8, at most kMostDim

  TokenRows q;    // unrotated: it is rotated on the way
  TokenRows k;    // rotated
  TokenRows v;    // like k
  TokenRows out;  // like q
  float* lse;     // (batch, heads, queries) with a unit last stride
  int64_t lse_strides[2];

  const void* positions;  // of the queries: (batch, queries) int64 or int32
  bool positions_are_int64;
  int64_t position_strides[2];

  FactorSets factors;
  Selection selection;    // of (sequences,)
  Integers cu_seqlens;    // (sequences + 1,) or nothing: then sequences are batch rows
  Integers cu_seqlens_k;  // likewise, of the keys
  Integers kv_start;      // (sequences,) or nothing: keys at slots below it are hidden
  int64_t sequences;

  bool interleaved;
  bool causal;
  double softmax_scale;  // not negative
  int64_t window;        // 0: none
  double softcap;        // 0: none
  int64_t stages;        // tiles of k and v in shared memory, 2 to 4; 0: what the device has room for
};

constexpr int64_t kMostDim = 128;

// Attends in one launch; throws std::runtime_error where that fails. Nothing is empty.
void attention(const AttentionArguments& arguments, const Place& place);

}  // namespace longrope_cuda
