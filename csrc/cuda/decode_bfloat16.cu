// `decode` for bfloat16.
#include "decode_launch.h"

namespace longrope_cuda {

void decode_bfloat16(const DecodeArguments& a, void* stream) {
  longrope::decode_of<longrope::BFloat16>(a, stream);
}

}  // namespace longrope_cuda
