// Split-KV decoding: the choice of the kernel, which is compiled once for each type.
#include "decode.h"

#include <stdexcept>

#include "launch.h"

namespace longrope_cuda {

void decode(const DecodeCall& a, const Splits& splits, const Place& place) {
  if (a.batch == 0 || a.queries == 0 || a.heads == 0) return;
  if (a.dim > 256) throw std::invalid_argument("decode: head_dim above 256");
  use_device(place.device);
  switch (a.type) {
    case longrope_calls::ElementType::kBFloat16:
      return decode_bfloat16(a, splits, place.stream);
    case longrope_calls::ElementType::kFloat16:
      return decode_float16(a, splits, place.stream);
    case longrope_calls::ElementType::kFloat32:
      throw std::invalid_argument("decode: expected bfloat16 or float16, got float32");
  }
}

}  // namespace longrope_cuda
