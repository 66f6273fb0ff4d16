#include "vector_avx2.h"
#include "rotary_kernel.h"

namespace longrope_cpu {

void rotary_avx2(const RotaryCall& call, int threads) { longrope::rotary_of_type(call, threads); }

}  // namespace longrope_cpu
