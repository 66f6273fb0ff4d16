// A vector of float32 in plain C++, for instruction sets without a file of their own.
#pragma once

#include "element.h"

namespace {
namespace longrope {

constexpr int kWidth = 8;

struct Vec {
  float lane[kWidth];
};

constexpr int kRowBlock = 1;  // queries that share a loaded key or value

inline Vec splat(float value) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v.lane[i] = value;
  return v;
}

template <typename T>
inline Vec load(const T* p) {
  Vec v;
  for (int i = 0; i < kWidth; ++i) v.lane[i] = widen(p[i]);
  return v;
}

template <typename T>
inline void store(T* p, Vec v) {
  for (int i = 0; i < kWidth; ++i) narrow(v.lane[i], p + i);
}

// Elements 0, 2, 4, ... of 2 * kWidth go to even, the others to odd.
template <typename T>
inline void load_pairs(const T* p, Vec& even, Vec& odd) {
  for (int i = 0; i < kWidth; ++i) {
    even.lane[i] = widen(p[2 * i]);
    odd.lane[i] = widen(p[2 * i + 1]);
  }
}

template <typename T>
inline void store_pairs(T* p, Vec even, Vec odd) {
  for (int i = 0; i < kWidth; ++i) {
    narrow(even.lane[i], p + 2 * i);
    narrow(odd.lane[i], p + 2 * i + 1);
  }
}

// p[i] = the sum of the lanes of v[i].
inline void store_sums(float* p, const Vec (&v)[4]) {
  for (int i = 0; i < 4; ++i) {
    p[i] = 0.0f;
    for (int lane = 0; lane < kWidth; ++lane) p[i] += v[i].lane[lane];
  }
}

// Stores the columns of v, kWidth rows, `stride` apart.
inline void store_columns(float* p, int64_t stride, const Vec (&v)[kWidth]) {
  for (int c = 0; c < kWidth; ++c) {
    for (int i = 0; i < kWidth; ++i) p[c * stride + i] = v[i].lane[c];
  }
}

inline Vec multiply(Vec a, Vec b) {
  for (int i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
  return a;
}

// a * b + c
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kWidth; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}

// a * b - c
inline Vec multiply_subtract(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kWidth; ++i) c.lane[i] = a.lane[i] * b.lane[i] - c.lane[i];
  return c;
}

}  // namespace longrope
}  // namespace
