#include "vector_avx512.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_avx512(const DecodeArguments& arguments) { longrope::decode_of_type(arguments); }

}  // namespace longrope_cpu
