// The standalone rotation on the CPU: one entry for each instruction set.
#pragma once

#include "../records.h"

namespace longrope_cpu {

using longrope_calls::RotaryCall;

// The result does not depend on the number of threads.
using RotaryFunction = void (*)(const RotaryCall& call, int threads);

void rotary_baseline(const RotaryCall& call, int threads);
void rotary_avx2(const RotaryCall& call, int threads);
void rotary_avx512(const RotaryCall& call, int threads);

}  // namespace longrope_cpu
