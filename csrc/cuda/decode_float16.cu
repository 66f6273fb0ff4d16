// `decode` for float16.
#include "decode_launch.h"

namespace longrope_cuda {

void decode_float16(const DecodeCall& a, const Splits& splits, void* stream) {
  longrope::decode_of<longrope::Float16>(a, splits, stream);
}

}  // namespace longrope_cuda
