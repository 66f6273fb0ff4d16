// The standalone rotation on the GPU: its entry.
#pragma once

#include "../records.h"
#include "place.h"

namespace longrope_cuda {

using longrope_calls::RotaryCall;

// Rotates q and k by one launch; throws std::runtime_error where that fails.
void rotary(const RotaryCall& call, const Place& place);

}  // namespace longrope_cuda
