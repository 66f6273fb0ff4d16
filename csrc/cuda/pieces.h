// What a thread moves of a row at once: 16 bytes, or one element.
#pragma once

#include "ptx.h"

namespace {
namespace longrope {

// 16 bytes of a row.
template <typename T>
struct WidePiece {
  static constexpr int kCount = 16 / sizeof(T);
  Words<4> words;

  __device__ __forceinline__ void load(const T* p) { words = load_streaming<4>(p); }
  __device__ __forceinline__ void store(T* p) const { *reinterpret_cast<Words<4>*>(p) = words; }
  __device__ __forceinline__ void get(float (&x)[kCount]) const {
    for_words([&](int i) {
      const float2 two = unpack<T>(words.at[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    });
  }
  __device__ __forceinline__ void set(const float (&x)[kCount]) {
    for_words([&](int i) { words.at[i] = pack<T>(x[2 * i], x[2 * i + 1]); });
  }

 private:
  template <typename Function>
  __device__ __forceinline__ static void for_words(Function function) {
#pragma unroll
    for (int i = 0; i < 4; ++i) function(i);
  }
};

template <>
struct WidePiece<float> {
  static constexpr int kCount = 4;
  struct alignas(16) Values {
    float at[4];
  } values;

  __device__ __forceinline__ void load(const float* p) {
    values = *reinterpret_cast<const Values*>(p);
  }
  __device__ __forceinline__ void store(float* p) const { *reinterpret_cast<Values*>(p) = values; }
  __device__ __forceinline__ void get(float (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = values.at[i];
  }
  __device__ __forceinline__ void set(const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) values.at[i] = x[i];
  }
};

// One element, for rows that are not whole pieces of 16 bytes.
template <typename T>
struct OneElement {
  static constexpr int kCount = 1;
  T value;

  __device__ __forceinline__ void load(const T* p) { value = *p; }
  __device__ __forceinline__ void store(T* p) const { *p = value; }
  __device__ __forceinline__ void get(float (&x)[1]) const {
    x[0] = unpack<T>(value.bits).x;
  }
  __device__ __forceinline__ void set(const float (&x)[1]) {
    value.bits = static_cast<uint16_t>(pack<T>(x[0], 0.0f));
  }
};

template <>
struct OneElement<float> {
  static constexpr int kCount = 1;
  float value;

  __device__ __forceinline__ void load(const float* p) { value = *p; }
  __device__ __forceinline__ void store(float* p) const { *p = value; }
  __device__ __forceinline__ void get(float (&x)[1]) const { x[0] = value; }
  __device__ __forceinline__ void set(const float (&x)[1]) { value = x[0]; }
};

}  // namespace longrope
}  // namespace
