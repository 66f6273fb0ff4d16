#include "vector_generic.h"
#include "rotary_kernel.h"

namespace longrope_cpu {

void rotary_baseline(const RotaryCall& call, int threads) {
  longrope::rotary_of_type(call, threads);
}

}  // namespace longrope_cpu
