// Picks the instruction set at run time.
#include "instruction_sets.h"

namespace longrope_cpu {

namespace {

struct Available {
  InstructionSet sets[4];
  int count = 0;

  void add(const InstructionSet& set) { sets[count++] = set; }

  Available() {
#if defined(LONGROPE_HAS_X86_KERNELS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(LONGROPE_HAS_AVX512_BF16)
      if (__builtin_cpu_supports("avx512bf16")) {
        add({"avx512_bf16", rotary_avx512, decode_avx512_bf16});
      }
#endif
      add({"avx512", rotary_avx512, decode_avx512});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      add({"avx2", rotary_avx2, decode_avx2});
    }
#endif
    add({"baseline", rotary_baseline, decode_baseline});
  }
};

}  // namespace

const InstructionSet* instruction_sets(int* count) {
  static const Available available;
  *count = available.count;
  return available.sets;
}

bool is_amd() {
#if defined(LONGROPE_HAS_X86_KERNELS)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace longrope_cpu
