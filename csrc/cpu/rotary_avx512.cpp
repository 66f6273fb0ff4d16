#include "vector_avx512.h"
#include "rotary_kernel.h"

namespace longrope_cpu {

void rotary_avx512(const RotaryArguments& arguments) { longrope::rotary_of_type(arguments); }

}  // namespace longrope_cpu
