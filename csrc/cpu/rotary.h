// The standalone rotation on the CPU: its arguments, and one entry for each instruction set.
#pragma once

#include <array>
#include <cstdint>

#include "element_type.h"

namespace longrope_cpu {

// q or k: (batch, seq, heads, dim) with a unit last stride. out may be in; strides in elements.
struct Heads {
  const void* in;
  void* out;
  int64_t heads;
  std::array<int64_t, 3> in_strides;   // batch, seq, heads
  std::array<int64_t, 3> out_strides;  // batch, seq, heads
};

struct RotaryArguments {
  Heads q;
  Heads k;
  ElementType type;
  int64_t batch;
  int64_t seq;
  int64_t dim;
  int64_t pairs;

  const void* positions;  // (batch, seq) int64 or int32
  bool positions_are_int64;
  std::array<int64_t, 2> position_strides;

  int64_t sets;                    // the number of factor sets
  const uint64_t* steps;           // (sets, 2, pairs); row 0 below n_hat
  const int64_t* n_hat;            // (sets,)
  const double* attention_factor;  // (sets,)
  const int64_t* max_length;       // (sets,)
  const int64_t* lengths;          // (sequences,) or null
  const int64_t* chosen_sets;      // (sequences,) or null; wins over lengths
  const int64_t* cu_seqlens;       // (sequences + 1,) or null
  int64_t sequences;

  bool interleaved;
  bool conjugate;  // negate the sine: the gradient
  int threads;
};

using RotaryFunction = void (*)(const RotaryArguments&);

void rotary_baseline(const RotaryArguments& arguments);
void rotary_avx2(const RotaryArguments& arguments);
void rotary_avx512(const RotaryArguments& arguments);

}  // namespace longrope_cpu
