// On the device: what a factor set says of a token.
#pragma once

#include "../selection.h"
#include "ptx.h"

namespace {
namespace longrope {

constexpr unsigned kAllLanes = 0xffffffffu;  // of a warp

// What a factor set says of a token: the row of its steps, 0 or 1, and the attention factor.
struct TokenFactor {
  int64_t row;
  float factor;
};

__device__ __forceinline__ TokenFactor factor_of_token(const Tables& tables, int64_t set,
                                                       int64_t n) {
  if (below_threshold(n, tables.n_hat[set])) return {0, 1.0f};
  return {1, static_cast<float>(tables.attention_factor[set])};
}

}  // namespace longrope
}  // namespace
