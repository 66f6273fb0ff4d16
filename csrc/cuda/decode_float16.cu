// `decode` for float16.
#include "decode_launch.h"

namespace longrope_cuda {

void decode_float16(const DecodeArguments& a, void* stream) {
  longrope::decode_of<longrope::Float16>(a, stream);
}

}  // namespace longrope_cuda
