#include "vector_avx2.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_avx2(const DecodeArguments& arguments) { longrope::decode_of_type(arguments); }

}  // namespace longrope_cpu
