// Writing new keys and values into a cache on the GPU: its entry.
#pragma once

#include "../records.h"
#include "place.h"

namespace longrope_cuda {

using longrope_calls::AppendCall;

// Writes k and v by one launch; throws std::runtime_error where that fails.
void append(const AppendCall& call, const Place& place);

}  // namespace longrope_cuda
