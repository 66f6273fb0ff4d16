// What the calls of several kernels have in common; all addresses are those of device memory.
#pragma once

#include <cstdint>

#include "../cpu/element_type.h"

namespace longrope_cuda {

using longrope_cpu::ElementType;

// A vector of int32 or int64, or of nothing.
struct Integers {
  const void* data;  // or null
  int64_t stride;    // in elements
  bool are_int64;
};

struct FactorSets {
  int64_t count;
  int64_t pairs;
  const uint64_t* steps;           // (count, 2, pairs); row 0 below n_hat
  const int64_t* n_hat;            // (count,)
  const double* attention_factor;  // (count,)
  const int64_t* max_length;       // (count,)
};

// Which set a sequence takes: the chosen one, that of its length, or the first.
struct Selection {
  Integers lengths;
  Integers sets;  // wins over lengths
};

// Where a call runs.
struct Place {
  int device;
  void* stream;  // a cudaStream_t
};

}  // namespace longrope_cuda
