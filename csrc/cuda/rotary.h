// The standalone rotation on the GPU: its arguments and its entry.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace longrope_cuda {

// q or k: (batch, seq, heads, dim) with a unit last stride. out may be in; strides in elements.
struct Heads {
  const void* in;
  void* out;
  int64_t heads;
  int64_t in_strides[3];   // batch, seq, heads
  int64_t out_strides[3];  // batch, seq, heads
};

struct RotaryArguments {
  Heads q;
  Heads k;
  ElementType type;
  int64_t batch;
  int64_t seq;
  int64_t dim;

  const void* positions;  // (batch, seq) int64 or int32
  bool positions_are_int64;
  int64_t position_strides[2];

  FactorSets factors;
  Selection selection;  // of (sequences,)
  Integers cu_seqlens;  // (sequences + 1,) or nothing: then sequences are batch rows
  int64_t sequences;

  bool interleaved;
  bool conjugate;  // negate the sine: the gradient
};

// Rotates q and k by one launch; throws std::runtime_error where that fails.
void rotary(const RotaryArguments& arguments, const Place& place);

}  // namespace longrope_cuda
