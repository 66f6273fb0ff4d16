#include "vector_generic.h"
#include "decode_kernel.h"

namespace longrope_cpu {

void decode_baseline(const DecodeCall& call, int threads) {
  longrope::decode_of_type(call, threads);
}

}  // namespace longrope_cpu
