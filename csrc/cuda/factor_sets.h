// On the device: which factor set a sequence takes, and what it says of a token.
#pragma once

#include "../rotation.h"
#include "arguments.h"
#include "ptx.h"

namespace {
namespace longrope {

using longrope_cuda::FactorSets;
using longrope_cuda::Integers;
using longrope_cuda::Selection;

constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp

__device__ __forceinline__ int64_t integer_at(const void* data, bool are_int64, int64_t at) {
  return are_int64 ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
}

__device__ __forceinline__ int64_t integer_at(const Integers& x, int64_t i) {
  return integer_at(x.data, x.are_int64, i * x.stride);
}

__device__ __forceinline__ int64_t set_of_sequence(const FactorSets& factors, const Selection& selection,
                                        int64_t sequence) {
  if (selection.sets.data != nullptr) {
    const int64_t set = integer_at(selection.sets, sequence);
    return set < 0 ? 0 : set < factors.count ? set : factors.count - 1;
  }
  if (selection.lengths.data == nullptr) return 0;
  return set_of_length(integer_at(selection.lengths, sequence), factors.max_length,
                       factors.count);
}

// The packed sequence of a token: how many of cu_seqlens[1:sequences] are not above it.
__device__ __forceinline__ int64_t sequence_of_token(const Integers& cu_seqlens, int64_t sequences,
                                          int64_t token) {
  int64_t first = 0, last = sequences - 1;
  while (first < last) {
    const int64_t middle = (first + last) / 2;
    if (integer_at(cu_seqlens, middle + 1) <= token) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return first;
}

// What a factor set says of a token: the row of its steps, 0 or 1, and the attention factor.
struct TokenFactor {
  int64_t row;
  float factor;
};

__device__ __forceinline__ TokenFactor factor_of_token(const FactorSets& factors, int64_t set, int64_t n) {
  if (below_threshold(n, factors.n_hat[set])) return {0, 1.0f};
  return {1, static_cast<float>(factors.attention_factor[set])};
}

}  // namespace longrope
}  // namespace
