#include "vector_avx2.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_avx2(const DecodeCall& call, int threads) { longrope::decode_of_type(call, threads); }

}  // namespace longrope_cpu
