// The rotation itself; compiled once for each instruction set, over the vector type included
// before it.
//
// Tokens go in blocks: the cosines and sines of a block are computed once, and serve all heads of
// q and k while they are in the L1 cache. Within a block the loop order follows the strides, so
// that memory is walked forwards in (batch, seq, heads, dim) and (batch, heads, seq, dim) alike.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "factor_set.h"
#include "rotary.h"

namespace {
namespace longrope {

using longrope_calls::ElementType;
using longrope_calls::Heads;
using longrope_calls::RotaryCall;

constexpr int64_t kBlock = 16;  // tokens; 16 * 64 pairs * 2 floats = 8 KiB of cosines and sines

template <bool kInterleaved, typename T>
inline void rotate_vector(const T* in_i, const T* in_j, T* out_i, T* out_j, const float* cos,
                          const float* sin) {
  Vec x_i, x_j;
  if constexpr (kInterleaved) {
    load_pairs(in_i, x_i, x_j);
  } else {
    x_i = load(in_i);
    x_j = load(in_j);
  }
  const Vec c = load(cos), s = load(sin);
  const Vec y_i = multiply_subtract(x_i, c, multiply(x_j, s));
  const Vec y_j = multiply_add(x_i, s, multiply(x_j, c));
  if constexpr (kInterleaved) {
    store_pairs(out_i, y_i, y_j);
  } else {
    store(out_i, y_i);
    store(out_j, y_j);
  }
}

// One head of one token.
template <bool kInterleaved, typename T>
inline void rotate_row(const T* in, T* out, const float* cos, const float* sin, int64_t pairs,
                       int64_t dim) {
  const int64_t whole = pairs / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const int64_t at = kInterleaved ? 2 * i : i;
    rotate_vector<kInterleaved>(in + at, in + pairs + at, out + at, out + pairs + at, cos + i,
                                sin + i);
  }
  if (whole < pairs) {
    T tail[2 * kWidth] = {};
    const int64_t left = pairs - whole, at = kInterleaved ? 2 * whole : whole;
    const size_t bytes = static_cast<size_t>(kInterleaved ? 2 * left : left) * sizeof(T);
    std::memcpy(tail, in + at, bytes);
    if (!kInterleaved) std::memcpy(tail + kWidth, in + pairs + at, bytes);
    rotate_vector<kInterleaved>(tail, tail + kWidth, tail, tail + kWidth, cos + whole,
                                sin + whole);
    std::memcpy(out + at, tail, bytes);
    if (!kInterleaved) std::memcpy(out + pairs + at, tail + kWidth, bytes);
  }
  if (out != in && 2 * pairs < dim) {
    std::memcpy(out + 2 * pairs, in + 2 * pairs,
                static_cast<size_t>(dim - 2 * pairs) * sizeof(T));
  }
}

// All heads of the tokens [begin, end) of one batch entry; row t of cos and sin is begin + t.
template <bool kInterleaved, typename T>
void rotate_block(const RotaryCall& a, const Heads& x, int64_t batch, int64_t begin,
                  int64_t end, const float* cos, const float* sin, int64_t row) {
  const T* in = static_cast<const T*>(x.in.data) + batch * x.in.strides[0];
  T* out = static_cast<T*>(x.out.data) + batch * x.out.strides[0];
  const auto one = [&](int64_t token, int64_t head) {
    const int64_t t = (token - begin) * row;
    rotate_row<kInterleaved>(in + token * x.in.strides[1] + head * x.in.strides[2],
                             out + token * x.out.strides[1] + head * x.out.strides[2], cos + t,
                             sin + t, a.tables.pairs, a.dim);
  };
  if (x.in.strides[2] <= x.in.strides[1]) {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t head = 0; head < x.heads; ++head) one(token, head);
  } else {
    for (int64_t head = 0; head < x.heads; ++head)
      for (int64_t token = begin; token < end; ++token) one(token, head);
  }
}

template <bool kInterleaved, typename T>
void rotary_of(const RotaryCall& a, int threads) {
  const int64_t row = round_up(a.tables.pairs);
  const int64_t blocks_of_sequence = (a.seq + kBlock - 1) / kBlock;
  const int64_t blocks = a.batch * blocks_of_sequence;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> table(static_cast<size_t>(2 * kBlock * row));
    float* cos = table.data();
    float* sin = cos + kBlock * row;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t batch = block / blocks_of_sequence;
      const int64_t begin = block % blocks_of_sequence * kBlock;
      const int64_t end = std::min(begin + kBlock, a.seq);
      for (int64_t token = begin; token < end; ++token) {
        const int64_t t = (token - begin) * row;
        const int64_t set = set_of_token(a.tables, a.selection, batch, token);
        cos_sin_row(a.tables, element(a.positions, batch, token), set, a.conjugate, cos + t,
                    sin + t);
      }
      rotate_block<kInterleaved, T>(a, a.q, batch, begin, end, cos, sin, row);
      rotate_block<kInterleaved, T>(a, a.k, batch, begin, end, cos, sin, row);
    }
  }
}

template <typename T>
void rotary_of(const RotaryCall& a, int threads) {
  a.tables.interleaved ? rotary_of<true, T>(a, threads) : rotary_of<false, T>(a, threads);
}

inline void rotary_of_type(const RotaryCall& a, int threads) {
  switch (a.type) {
    case ElementType::kFloat32:
      return rotary_of<float>(a, threads);
    case ElementType::kBFloat16:
      return rotary_of<BFloat16>(a, threads);
    case ElementType::kFloat16:
      return rotary_of<Float16>(a, threads);
  }
}

}  // namespace longrope
}  // namespace
