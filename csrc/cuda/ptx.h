// Instructions that C++ has no words for: asynchronous copies, matrix products and what surrounds
// them. Under LONGROPE_EMULATE the emulator of tests/cpp/emulator stands in for the hardware.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../cpu/element.h"
#include "launch.h"

#if defined(LONGROPE_EMULATE)
#include "emulator/tensor_cores.h"
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "expected compute capability 8.0 or newer: cp.async, and bfloat16 in mma and cvt"
#endif

namespace {
namespace longrope {

// The dynamic shared memory of the block, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(LONGROPE_EMULATE)
  return longrope_emulator::Machine::instance().shared();
#else
  extern __shared__ __align__(128) unsigned char longrope_shared[];
  return longrope_shared;
#endif
}

// Registers that one instruction loads or stores: four are 16 bytes.
template <int kCount>
struct alignas(4 * kCount) Words {
  uint32_t at[kCount];
};

#if defined(LONGROPE_EMULATE)

// Words that are read once and need no place in the L1 cache.
template <int kCount>
inline Words<kCount> load_streaming(const void* p) {
  return *static_cast<const Words<kCount>*>(p);
}

// Four bytes of low (0 to 3) and high (4 to 7): a hexadecimal digit of select for each.
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t which = select >> (4 * i) & 7u;
    chosen |= (static_cast<uint32_t>(bytes >> (8 * which)) & 0xffu) << (8 * i);
  }
  return chosen;
}

using longrope_emulator::cp_async_16;
using longrope_emulator::cp_async_commit;

template <int kPending>
inline void cp_async_wait() {
  longrope_emulator::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  longrope_emulator::ldmatrix_x4(registers, row, false);
}

inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) {
  longrope_emulator::ldmatrix_x4(registers, row, true);
}

template <typename T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  longrope_emulator::mma_m16n8k16(d, a, b0, b1, [](uint16_t bits) { return widen(T{bits}); });
}

// Two floats rounded to nearest even in one register, the first in its lower half.
template <typename T>
inline uint32_t pack(float low, float high) {
  T pair[2];
  narrow(low, pair);
  narrow(high, pair + 1);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
}

template <typename T>
inline float2 unpack(uint32_t pair) {
  return {widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})};
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float cos_approx(float x) { return std::cos(x); }
inline float sin_approx(float x) { return std::sin(x); }

#else

// Words that are read once and need no place in the L1 cache.
template <int kCount>
__device__ __forceinline__ Words<kCount> load_streaming(const void* p);

template <>
__device__ __forceinline__ Words<4> load_streaming<4>(const void* p) {
  Words<4> x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "l"(p));
  return x;
}

template <>
__device__ __forceinline__ Words<2> load_streaming<2>(const void* p) {
  Words<2> x;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(x.at[0]), "=r"(x.at[1])
               : "l"(p));
  return x;
}

// Four bytes of low (0 to 3) and high (4 to 7): a hexadecimal digit of select for each.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t select) {
  return __byte_perm(low, high, select);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or where not `valid` writes zeros, without waiting for them. Both addresses are
// aligned to 16; global is not read where not valid. Past the L1 cache: tiles are read once.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of this thread's copies; it may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all groups of this thread but the last kPending. Other threads see the copies after a
// barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i,
// aligned to 16. Register i of lane l then holds elements 2 (l % 4) and the next of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, transposed: elements 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b of a warp: a 16 x 16 and b 16 x 8 of T, d 16 x 8 of float32. With g = lane / 4 and
// t = 2 (lane % 4), a register holds two elements, at
//   a: (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)   b: (t, g), (t + 8, g), down its columns
//   d: (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1), one each
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to nearest even in one register, the first in its lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);

template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack<Float16>(uint32_t pair) {
  float2 both;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(both.x), "=f"(both.y)
      : "r"(pair));
  return both;
}

// 2**x within two units in the last place; results below 2**-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The logarithm to base 2, within 2**-22.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within one unit in the last place; 0 where that is below 2**-126.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Within 2**-20.5 for x in [-pi, pi].
__device__ __forceinline__ float cos_approx(float x) {
  float y;
  asm("cos.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sin_approx(float x) {
  float y;
  asm("sin.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace longrope
}  // namespace
