#include "vector_generic.h"
#include "rotary_kernel.h"

namespace longrope_cpu {

void rotary_baseline(const RotaryArguments& arguments) { longrope::rotary_of_type(arguments); }

}  // namespace longrope_cpu
