#include "vector_avx2.h"
#include "rotary_kernel.h"

namespace longrope_cpu {

void rotary_avx2(const RotaryArguments& arguments) { longrope::rotary_of_type(arguments); }

}  // namespace longrope_cpu
