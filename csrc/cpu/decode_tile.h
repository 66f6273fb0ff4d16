// What a tile of keys and values meets: rotation into scratch memory, products with queries, and
// weighted sums, all of it in float32 over the vector type included before.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "decode_softmax.h"
#include "factor_set.h"
#include "key_angles.h"
#include "scratch.h"

// GCC keeps arrays of vectors in memory unless the loops over them are unrolled early, and calls
// the lambdas that get vectors one by one unless it is told not to.
#if defined(__GNUC__) && !defined(__clang__)
#define LONGROPE_UNROLL _Pragma("GCC unroll 8")
#define LONGROPE_ALWAYS_INLINE __attribute__((always_inline))
#else
#define LONGROPE_UNROLL
#define LONGROPE_ALWAYS_INLINE
#endif

namespace {
namespace longrope {

constexpr int kVecBlock = 4;   // vectors of a value held in registers

// How one head lies in scratch memory: the first halves of its pairs, the second halves, and what
// is not rotated, each padded with zeros to whole vectors.
struct Layout {
  int64_t pairs;
  int64_t rest;
  int64_t row;     // padded pairs
  int64_t padded;  // all three parts
  int64_t values;  // padded dim: values and the output have no parts

  Layout(int64_t dim, int64_t rotated_pairs)
      : pairs(rotated_pairs),
        rest(dim - 2 * rotated_pairs),
        row(round_up(pairs)),
        padded(2 * row + round_up(rest)),
        values(round_up(dim)) {}
};

// The layout of a frequent head, known to the compiler, which then unrolls what goes through it.
template <int kPairs, int kRest>
struct FixedLayout {
  static_assert(kPairs % kWidth == 0 && kRest % kWidth == 0, "no part is padded");
  static constexpr int64_t pairs = kPairs;
  static constexpr int64_t rest = kRest;
  static constexpr int64_t row = kPairs;
  static constexpr int64_t dim = 2 * kPairs + kRest;
  static constexpr int64_t padded = dim;
};

// Calls the function with the fixed layout that is like this one, if there is one.
template <typename Function>
inline bool with_fixed(const Layout& layout, const Function& function) {
  const auto call = [&](auto fixed) {
    const bool same = layout.pairs == fixed.pairs && layout.rest == fixed.rest;
    if (same) function(fixed);
    return same;
  };
  return call(FixedLayout<64, 0>()) ||  // Llama 3, Mistral, Qwen3
         call(FixedLayout<48, 0>()) ||  // Phi-3-mini
         call(FixedLayout<48, 32>());   // Phi-4-mini
}

// The next 2 * kWidth elements in the order that costs least; store_two undoes it. bfloat16 comes
// apart into even and odd elements by a shift and a mask, the others stay in order.
template <typename T>
constexpr bool kEvenOdd = std::is_same<T, BFloat16>::value;

template <typename T, typename AnyVec>
inline void load_two(const T* p, AnyVec& first, AnyVec& second) {
  if constexpr (kEvenOdd<T>) {
    load_pairs(p, first, second);
  } else {
    first = load(p);
    second = load(p + kWidth);
  }
}

template <typename T>
inline void store_two(T* p, Vec first, Vec second) {
  if constexpr (kEvenOdd<T>) {
    store_pairs(p, first, second);
  } else {
    store(p, first);
    store(p + kWidth, second);
  }
}

// Widens count elements, pads them with zeros to whole vectors, and calls visit(vector, index of
// its first element) for each.
template <typename T, typename Visit>
LONGROPE_ALWAYS_INLINE inline void widen_vectors(const T* in, int64_t count, const Visit& visit) {
  const int64_t whole = count / kWidth * kWidth;
  int64_t i = 0;
LONGROPE_UNROLL
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    Vec first, second;
    load_two(in + i, first, second);
    visit(first, i);
    visit(second, i + kWidth);
  }
  for (; i < whole; i += kWidth) visit(load(in + i), i);
  if (whole < count) {
    T tail[kWidth] = {};
    std::memcpy(tail, in + whole, static_cast<size_t>(count - whole) * sizeof(T));
    visit(load(tail), whole);
  }
}

// Rotates one head of one token, and calls visit(vector, place in the layout) for each vector.
template <bool kInterleaved, typename T, typename AnyLayout, typename Visit>
LONGROPE_ALWAYS_INLINE inline void turn_vectors(const T* in, const float* cos, const float* sin,
                                         const AnyLayout& layout, const Visit& visit) {
  const int64_t pairs = layout.pairs, whole = pairs / kWidth * kWidth;
  const auto turn = [&](Vec x_i, Vec x_j, int64_t i) LONGROPE_ALWAYS_INLINE {
    const Vec c = load(cos + i), s = load(sin + i);
    visit(multiply_subtract(x_i, c, multiply(x_j, s)), i);
    visit(multiply_add(x_i, s, multiply(x_j, c)), layout.row + i);
  };
  Vec x_i, x_j;
  int64_t i = 0;
  if constexpr (!kInterleaved) {
LONGROPE_UNROLL
    for (; i + 2 * kWidth <= pairs; i += 2 * kWidth) {
      Vec next_i, next_j;
      load_two(in + i, x_i, next_i);
      load_two(in + pairs + i, x_j, next_j);
      turn(x_i, x_j, i);
      turn(next_i, next_j, i + kWidth);
    }
  }
  for (; i < whole; i += kWidth) {
    if constexpr (kInterleaved) {
      load_pairs(in + 2 * i, x_i, x_j);
    } else {
      x_i = load(in + i);
      x_j = load(in + pairs + i);
    }
    turn(x_i, x_j, i);
  }
  if (whole < pairs) {
    T tail[2 * kWidth] = {};
    const int64_t left = pairs - whole, at = kInterleaved ? 2 * whole : whole;
    const size_t bytes = static_cast<size_t>(kInterleaved ? 2 * left : left) * sizeof(T);
    std::memcpy(tail, in + at, bytes);
    if constexpr (kInterleaved) {
      load_pairs(tail, x_i, x_j);
    } else {
      std::memcpy(tail + kWidth, in + pairs + at, bytes);
      x_i = load(tail);
      x_j = load(tail + kWidth);
    }
    turn(x_i, x_j, whole);
  }
  if (layout.rest > 0) {
    const auto visit_rest = [&](Vec x, int64_t i) LONGROPE_ALWAYS_INLINE {
      visit(x, 2 * layout.row + i);
    };
    widen_vectors(in + 2 * pairs, layout.rest, visit_rest);
  }
}

// Rotates one head of one token into scratch memory.
template <bool kInterleaved, typename T>
inline void turn_row(const T* in, float* out, const float* cos, const float* sin,
                     const Layout& layout) {
  const auto visit = [&](Vec x, int64_t at) LONGROPE_ALWAYS_INLINE { store(out + at, x); };
  turn_vectors<kInterleaved>(in, cos, sin, layout, visit);
}

// Widens count elements into scratch memory.
template <typename T>
inline void widen_row(const T* in, int64_t count, float* out) {
  widen_vectors(in, count, [&](Vec x, int64_t i) LONGROPE_ALWAYS_INLINE { store(out + i, x); });
}

// Asks for a row of elements in the cache of this level (3: L1, 2: L2). In line, and so must be
// callers that do nothing else: GCC removes calls of functions that only prefetch.
template <int kLocality, typename T>
LONGROPE_ALWAYS_INLINE inline void prefetch_row(const T* row, int64_t count) {
#if defined(__GNUC__)
  const char* const bytes = reinterpret_cast<const char*>(row);
LONGROPE_UNROLL
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i, 0, kLocality);
  }
#endif
}

// The products of kRows queries with one key, which is rotated in registers on the way.
template <int kRows, typename T, typename Fixed>
inline void score_key(const T* key, const float* q, const float* cos, const float* sin,
                      Fixed layout, float* scores) {
  constexpr int kQuads = (kRows + 3) / 4;
  Vec sums[kQuads][4];
LONGROPE_UNROLL
  for (int quad = 0; quad < kQuads; ++quad)
LONGROPE_UNROLL
    for (int r = 0; r < 4; ++r) sums[quad][r] = splat(0.0f);
  const auto visit = [&](Vec x, int64_t at) LONGROPE_ALWAYS_INLINE {
LONGROPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Vec& sum = sums[r / 4][r % 4];
      sum = multiply_add(x, load(q + r * layout.padded + at), sum);
    }
  };
  turn_vectors<false>(key, cos, sin, layout, visit);
LONGROPE_UNROLL
  for (int quad = 0; quad < kQuads; ++quad) {
    float of_rows[4];
    store_sums(of_rows, sums[quad]);
LONGROPE_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (4 * quad + r < kRows) scores[(4 * quad + r) * kTile] = of_rows[r];
    }
  }
}

// The products of kRows queries with kGroup keys, all of them `padded` apart.
template <int kRows>
inline void score_block(const float* q, const float* keys, int64_t padded, float* scores) {
  Vec sums[kRows][kGroup];
LONGROPE_UNROLL
  for (int r = 0; r < kRows; ++r)
LONGROPE_UNROLL
    for (int j = 0; j < kGroup; ++j) sums[r][j] = splat(0.0f);
  for (int64_t i = 0; i < padded; i += kWidth) {
    Vec x[kGroup];
LONGROPE_UNROLL
    for (int j = 0; j < kGroup; ++j) x[j] = load(keys + j * padded + i);
LONGROPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const Vec y = load(q + r * padded + i);
LONGROPE_UNROLL
      for (int j = 0; j < kGroup; ++j) sums[r][j] = multiply_add(x[j], y, sums[r][j]);
    }
  }
LONGROPE_UNROLL
  for (int r = 0; r < kRows; ++r) store_sums(scores + r * kTile, sums[r]);
}

// The columns (width, kTile) of rows (kTile, width), whole vectors.
inline void transpose_tile(const float* rows, int64_t width, float* columns) {
  for (int64_t j = 0; j < kTile; j += kWidth) {
    for (int64_t c = 0; c < width; c += kWidth) {
      Vec lanes[kWidth];
      for (int i = 0; i < kWidth; ++i) lanes[i] = load(rows + (j + i) * width + c);
      store_columns(columns + c * kTile + j, kTile, lanes);
    }
  }
}

template <int kVecs, typename T, typename AnyVec>
inline void load_vectors(const T* p, AnyVec (&x)[kVecs]) {
LONGROPE_UNROLL
  for (int c = 0; c + 1 < kVecs; c += 2) load_two(p + c * kWidth, x[c], x[c + 1]);
  if constexpr (kVecs % 2 == 1) x[kVecs - 1] = load(p + (kVecs - 1) * kWidth);
}

// The weighted sum of values over the keys of a tile, for kRows queries, whose weights are
// `weight_stride` apart, and kVecs vectors; weights are of float32, or pairs as the values. Asks for
// what lies so many elements ahead meanwhile, unless that is 0.
template <int kRows, int kVecs, typename T, typename Weight>
inline void add_block(const T* const* values, int64_t offset, int64_t ahead, int64_t keys,
                      const Weight* weights, int64_t weight_stride, float* sums, int64_t stride) {
  Vec sum[kRows][kVecs];
LONGROPE_UNROLL
  for (int r = 0; r < kRows; ++r)
LONGROPE_UNROLL
    for (int c = 0; c < kVecs; ++c) sum[r][c] = load(sums + r * stride + c * kWidth);
  for (int64_t j = 0; j < keys; ++j) {
    decltype(splat(*weights)) x[kVecs];
    load_vectors(values[j] + offset, x);
    if (ahead != 0) prefetch_row<2>(values[j] + offset + ahead, kVecs * kWidth);
LONGROPE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto w = splat(weights[r * weight_stride + j]);
LONGROPE_UNROLL
      for (int c = 0; c < kVecs; ++c) sum[r][c] = multiply_add(x[c], w, sum[r][c]);
    }
  }
LONGROPE_UNROLL
  for (int r = 0; r < kRows; ++r)
LONGROPE_UNROLL
    for (int c = 0; c < kVecs; ++c) store(sums + r * stride + c * kWidth, sum[r][c]);
}

// Calls the function with std::integral_constant<int, min(n, kMost)>, n from 1.
template <int kMost, typename Function>
inline void with_constant(int64_t n, const Function& function) {
  if constexpr (kMost > 1) {
    if (n < kMost) return with_constant<kMost - 1>(n, function);
  }
  function(std::integral_constant<int, kMost>());
}

// `add_block` for any number of rows and vectors; the first rows ask for what lies ahead.
template <typename T, typename Weight>
inline void add_rows(const T* const* values, int64_t offset, int64_t ahead, int64_t keys,
                     const Weight* weights, int64_t weight_stride, int64_t count, float* sums,
                     int64_t width) {
  for (int64_t c = 0; c < width; c += kVecBlock * kWidth) {
    with_constant<kVecBlock>((width - c) / kWidth, [&](auto vecs) {
      for (int64_t row = 0; row < count; row += kRowBlock) {
        with_constant<kRowBlock>(count - row, [&](auto rows) {
          add_block<rows(), vecs()>(values, offset + c, row == 0 ? ahead : 0, keys,
                                    weights + row * weight_stride, weight_stride,
                                    sums + row * width + c, width);
        });
      }
    });
  }
}

}  // namespace longrope
}  // namespace
