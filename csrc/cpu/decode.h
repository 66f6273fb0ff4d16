// Attention of a few queries to a cache of unrotated keys on the CPU: one entry for each
// instruction set.
#pragma once

#include "../records.h"

namespace longrope_cpu {

using longrope_calls::DecodeCall;

// Caches have the type of q and no scales. The result does not depend on the number of threads.
using DecodeFunction = void (*)(const DecodeCall& call, int threads);

void decode_baseline(const DecodeCall& call, int threads);
void decode_avx2(const DecodeCall& call, int threads);
void decode_avx512(const DecodeCall& call, int threads);
void decode_avx512_bf16(const DecodeCall& call, int threads);

}  // namespace longrope_cpu
