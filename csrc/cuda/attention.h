// Attention of many queries (prefill) on the GPU: its entry.
#pragma once

#include <cstdint>

#include "../records.h"
#include "place.h"

namespace longrope_cuda {

using longrope_calls::AttentionCall;

constexpr int64_t kMostDim = 128;

// Attends in one launch; throws std::runtime_error where that fails. Nothing is empty. q is rotated
// on the way, keys are rotated. bfloat16 or float16; dim is a multiple of 8, at most kMostDim;
// addresses and strides of q, keys, and out are multiples of 16 bytes. stages: tiles of k and v in
// shared memory, 2 to 4; 0: what the device has room for.
void attention(const AttentionCall& call, int64_t stages, const Place& place);

}  // namespace longrope_cuda
