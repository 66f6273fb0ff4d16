#include "vector_avx512_bf16.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_avx512_bf16(const DecodeCall& call, int threads) {
  longrope::decode_of_type(call, threads);
}

}  // namespace longrope_cpu
