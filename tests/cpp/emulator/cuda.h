// The words of CUDA C++ that our kernels use, for a compiler that has none of them.
//
// Shared memory declared with a size is not poisoned; that of `dynamic_shared` in csrc/cuda/ptx.h is.
#pragma once

#include <cmath>
#include <cstdint>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

using cudaStream_t = void*;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <typename To, typename From>
inline To longrope_bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To same;
  std::memcpy(&same, &value, sizeof same);
  return same;
}
inline float __uint_as_float(unsigned bits) { return longrope_bits_as<float>(bits); }
inline float __int_as_float(int bits) { return longrope_bits_as<float>(bits); }
inline unsigned __float_as_uint(float x) { return longrope_bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return longrope_bits_as<int>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __threadfence() {}
inline void __syncthreads() { longrope_emulator::Machine::instance().barrier(); }
inline void __syncwarp(unsigned mask = ~0u) {
  longrope_emulator::Machine::instance().meet("__syncwarp", mask, nullptr, [] {});
}

template <typename T>
inline T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <typename T>
inline T atomicMax(T* address, T value) {
  const T before = *address;
  *address = max(before, value);
  return before;
}

namespace longrope_emulator {

// The value of another lane; `source` within the group of `width` lanes, itself where outside.
template <typename T, typename Source>
T shuffle(const char* name, unsigned mask, T value, int width, const Source& source) {
  struct Operands {
    T value;
    T result;
    int from;
  };
  Machine& machine = Machine::instance();
  const int first = machine.lane() / width * width;
  const int wanted = source(machine.lane() - first);
  Operands mine{value, value,
                wanted < 0 || wanted >= width ? machine.lane() : first + wanted};
  machine.meet(name, mask, &mine, [&] {
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      auto& of = machine.operands_of<Operands>(i);
      if ((mask >> of.from & 1u) == 0) fail(std::string(name) + ": from a lane not in its mask");
      of.result = machine.operands_of<Operands>(of.from).value;
    }
  });
  return mine.result;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
  struct Operands {
    bool predicate;
    unsigned result;
  };
  Machine& machine = Machine::instance();
  Operands mine{predicate, 0};
  machine.meet(name, mask, &mine, [&] {
    unsigned bits = 0;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) != 0 && machine.operands_of<Operands>(i).predicate) bits |= 1u << i;
    }
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) != 0) machine.operands_of<Operands>(i).result = bits;
    }
  });
  return mine.result;
}

}  // namespace longrope_emulator

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return longrope_emulator::shuffle("__shfl_sync", mask, value, width,
                                    [&](int) { return lane & (width - 1); });
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  return longrope_emulator::shuffle("__shfl_xor_sync", mask, value, width,
                                    [&](int me) { return me ^ bits; });
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return longrope_emulator::shuffle("__shfl_up_sync", mask, value, width,
                                    [&](int me) { return me - static_cast<int>(delta); });
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return longrope_emulator::shuffle("__shfl_down_sync", mask, value, width,
                                    [&](int me) { return me + static_cast<int>(delta); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return longrope_emulator::ballot("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return longrope_emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return longrope_emulator::ballot("__all_sync", mask, predicate != 0) == mask;
}
