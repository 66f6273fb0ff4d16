// What a call hands down to the kernels, on the CPU and the GPU alike: the records of
// longrope_kernels/calls/records.py, in the order of their fields.
//
// Tensors are addresses in the memory of the device that the call runs on, and strides in elements.
#pragma once

#include <cstdint>

namespace longrope_calls {

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16 };

// (batch, tokens, heads, dim) with a unit last stride; of a paged cache (blocks, block_size, ...).
struct TokenRows {
  void* data;
  int64_t strides[3];
};

// A vector or a matrix of int32 or int64, or nothing. The second stride of a vector is 0.
struct Integers {
  const void* data;  // or null
  int64_t strides[2];
  bool are_int64;
};

// A vector, or nothing.
struct Scales {
  const float* data;  // or null
  int64_t stride;
};

struct Tables {
  const uint64_t* steps;           // (sets, 2, pairs); row 0 below n_hat
  const int64_t* n_hat;            // (sets,)
  const double* attention_factor;  // (sets,)
  const int64_t* max_length;       // (sets,)
  bool interleaved;
  int64_t sets;
  int64_t pairs;
};

// Which set a sequence takes: the chosen one, that of its length, or the first. Where decoding, of
// queries: lengths are then (sequences, queries), and without any a query takes that of the tokens
// up to it.
struct Selection {
  Integers lengths;
  Integers sets;      // wins over lengths
  Integers borders;   // (sequences + 1,), or nothing: then sequences are batch rows
  int64_t sequences;
};

struct Scores {
  bool causal;
  double scale;    // not negative
  int64_t window;  // 0: none
  double cap;      // 0: none
};

// Keys of a call, or a cache of unrotated ones.
struct Keys {
  TokenRows k;
  TokenRows v;
  Integers positions;    // (batch, slots); nothing, of a cache alone: slot - start
  Integers start;        // (sequences,), or nothing for 0: keys at slots below it are hidden
  Integers borders;      // (sequences + 1,), or nothing
  Integers lens;         // (batch,), of a cache
  Integers block_table;  // (batch, max_blocks) int32, or nothing: the cache is dense
  Scales k_scale;        // (kv_heads,), or nothing for 1
  Scales v_scale;
  int32_t slots;         // of a row of k: those of a block where there is a block table
};

// q or k and where it goes, which may be itself.
struct Heads {
  TokenRows in;
  TokenRows out;
  int64_t heads;
};

struct RotaryCall {
  ElementType type;
  int64_t batch;
  int64_t seq;
  int64_t dim;
  Heads q;
  Heads k;
  Integers positions;  // (batch, seq)
  Tables tables;
  Selection selection;
  bool conjugate;  // negate the sine: the gradient
};

struct AttentionCall {
  ElementType type;  // of q, out, and keys
  int32_t batch;     // 1 where sequences are packed
  int32_t queries;   // of a batch row
  int32_t heads;     // a multiple of kv_heads
  int32_t dim;
  int32_t kv_heads;
  TokenRows q;    // unrotated
  TokenRows out;  // like q
  float* lse;     // (batch, heads, queries) with a unit last stride
  int64_t lse_strides[2];
  Integers positions;  // of the queries: (batch, queries)
  Keys keys;
  Tables tables;
  Selection selection;
  Scores scores;
};

struct AppendCall {
  ElementType type;  // of k and v
  int64_t batch;
  int64_t tokens;    // of a batch row
  int64_t heads;
  int64_t dim;
  bool cache_is_float8;  // else of `type` too
  TokenRows k;
  TokenRows v;
  Keys cache;            // written; its lens say where, and its block table
  Integers slot_mapping;  // (batch, tokens), in place of both; or nothing
};

struct DecodeCall {
  ElementType type;  // of q and out
  int32_t batch;
  int32_t queries;  // of a sequence; query t has slot lens - queries + t
  int32_t heads;    // a multiple of kv_heads
  int32_t dim;
  int32_t kv_heads;
  TokenRows q;    // unrotated
  TokenRows out;  // like q
  float* lse;     // (batch, heads, queries), contiguous
  bool caches_are_float8;  // else of `type` too
  Keys keys;
  Tables tables;
  Selection selection;
  Scores scores;
  Scales sinks;  // (heads,), or nothing: logits without a value; of the CPU alone
};

}  // namespace longrope_calls
