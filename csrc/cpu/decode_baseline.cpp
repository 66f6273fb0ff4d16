#include "vector_generic.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_baseline(const DecodeArguments& arguments) { longrope::decode_of_type(arguments); }

}  // namespace longrope_cpu
