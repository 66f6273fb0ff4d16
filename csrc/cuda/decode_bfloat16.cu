// `decode` for bfloat16.
#include "decode_launch.h"

namespace longrope_cuda {

void decode_bfloat16(const DecodeCall& a, const Splits& splits, void* stream) {
  longrope::decode_of<longrope::BFloat16>(a, splits, stream);
}

}  // namespace longrope_cuda
