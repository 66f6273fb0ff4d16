#include "vector_avx512.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_avx512(const DecodeCall& call, int threads) { longrope::decode_of_type(call, threads); }

}  // namespace longrope_cpu
