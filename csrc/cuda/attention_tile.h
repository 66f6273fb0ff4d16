// The parts of a tile of attention: where its elements lie, its copies, its products, its softmax.
//
// A warp takes 32 queries, as two fragments of 16 rows: each fragment of keys or values that it
// loads serves two products, so that shared memory keeps up with the matrix units.
#pragma once

#include <limits>

#include "ptx.h"

namespace {
namespace longrope {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kFragments = 2;                        // of 16 rows, of a warp
constexpr int kWarpRows = 16 * kFragments;
constexpr int kBlockM = kWarps * kWarpRows;          // queries of a tile
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Keys of a tile: as many as leave room in 255 registers for the scores and the outputs.
template <int kDim>
constexpr int kBlockN = kDim <= 64 ? 96 : 64;

// What each thread has summed up of the weights of its rows. It lies in shared memory, since
// registers hold no more; each thread reads and writes its own four numbers alone.
using RowSums = float[2 * kFragments][kThreads];

// Rows of kDim 16-bit elements in shared memory, cut into chunks of 16 bytes, which are swizzled:
// the same chunk of 8 rows, and neighbouring chunks of one row, lie in different banks.
template <int kDim>
struct Layout {
  static constexpr int kPitch = 2 * kDim;  // bytes of a row
  // Rows of 192 bytes alternate between the two halves of the banks by themselves.
  static constexpr bool kWhole = kDim % 64 == 0;
  // Threads side by side on a row; chunks beyond them lie at the same swizzle.
  static constexpr int kLanes = kWhole ? 8 : 4;
  static constexpr int kGroups = kDim / 8 / kLanes;

  // Depends on row % 8 alone.
  __device__ __forceinline__ static int swizzle(int row) {
    return kWhole ? row & 7 : (row >> 1) & 3;
  }
  // From the place of chunk c of a row, which is 0 or 1, to that of chunk 2 d + c. Swizzles stay
  // within kLanes chunks, so that few places are not a constant away from each other.
  __device__ __forceinline__ static int ahead(int place, int d) {
    constexpr int kPairs = kLanes / 2;
    return (place ^ (d % kPairs << 5)) + (d / kPairs * kLanes << 4);
  }
  // Where chunk `chunk` of a row begins.
  __device__ __forceinline__ static int offset(int row, int chunk) {
    return row * kPitch + ((chunk ^ swizzle(row)) << 4);
  }
};

// ------------------------------------------------------------------------------------------ copies

// Copies kRows rows of dim elements from first on into a tile, by `threads` threads of which this
// is number `thread`. Rows from end on and dimensions from dim to kDim become 0. Not waited for.
template <int kDim, int kRows, int kCopiers, typename T>
__device__ __forceinline__ void copy_rows(unsigned char* tile, const T* from, int64_t stride,
                                          int first, int end, int dim, int thread) {
  using At = Layout<kDim>;
  constexpr int kAtOnce = kCopiers / At::kLanes;
  static_assert(kAtOnce % 8 == 0 && kRows % kAtOnce == 0, "a thread keeps its swizzle");
  const int row = thread / At::kLanes, chunk = thread % At::kLanes;
  unsigned char* const to = tile + At::offset(row, chunk);
  const T* source = from + (first + row) * stride + 8 * chunk;
#pragma unroll
  for (int i = 0; i < kRows / kAtOnce; ++i) {
    const bool exists = first + row + i * kAtOnce < end;
#pragma unroll
    for (int group = 0; group < At::kGroups; ++group) {
      const int ahead = group * At::kLanes;
      cp_async_16(to + i * kAtOnce * At::kPitch + 16 * ahead, source + 8 * ahead,
                  exists && 8 * (chunk + ahead) < dim);
    }
    source += kAtOnce * stride;
  }
}

// Waits for all groups of copies but the last stages - 2 + `more`, with stages from 2 to 4.
template <int kMore>
__device__ __forceinline__ void wait_for_tile(int stages) {
  if (stages == 2) {
    cp_async_wait<kMore>();
  } else if (stages == 3) {
    cp_async_wait<kMore + 1>();
  } else {
    cp_async_wait<kMore + 2>();
  }
}

// ---------------------------------------------------------------------------------------- products

// Keeps what is computed from x next to its use: the compiler would else hoist it out of the loop
// over tiles, where no registers are left for it.
__device__ __forceinline__ void forget_origin(int& x) {
#if defined(LONGROPE_EMULATE)
  (void)x;
#else
  asm volatile("" : "+r"(x));
#endif
}

// Scores of the warp's queries and a tile of keys: s[m][n] is the fragment of queries 16 m and keys
// 8 n on.
template <typename T, int kDim>
__device__ __forceinline__ void score(float (&s)[kFragments][kBlockN<kDim> / 8][4],
                                      const unsigned char* queries, const unsigned char* keys,
                                      int lane) {
  using At = Layout<kDim>;
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int n = 0; n < kBlockN<kDim> / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;

  forget_origin(lane);
  const int swizzle = At::swizzle(lane & 7);
  const unsigned char* const of_q = queries + (lane & 15) * At::kPitch;
  const int chunk_q = ((lane >> 4) ^ swizzle) << 4;
  const unsigned char* const of_k = keys + ((lane & 7) + (lane >> 4 << 3)) * At::kPitch;
  const int chunk_k = ((lane >> 3 & 1) ^ swizzle) << 4;
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
      ldmatrix_x4(a[m], of_q + 16 * m * At::kPitch + At::ahead(chunk_q, d));
    }
#pragma unroll
    for (int n = 0; n < kBlockN<kDim> / 16; ++n) {
      uint32_t b[4];  // keys 16 n on, then keys 16 n + 8 on
      ldmatrix_x4(b, of_k + 16 * n * At::kPitch + At::ahead(chunk_k, d));
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        mma_m16n8k16<T>(s[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Adds the values of a tile, weighted by p: o[m][n] is the fragment of queries 16 m and dimensions
// 8 n on. Scores lie in registers just as the product wants its weights.
template <typename T, int kDim>
__device__ __forceinline__ void add_values(float (&o)[kFragments][kDim / 8][4],
                                           const float (&p)[kFragments][kBlockN<kDim> / 8][4],
                                           const unsigned char* values, int lane) {
  using At = Layout<kDim>;
  const unsigned char* const of_v = values + (lane & 15) * At::kPitch;
  const int chunk_v = ((lane >> 4) ^ At::swizzle(lane & 7)) << 4;
#pragma unroll
  for (int j = 0; j < kBlockN<kDim> / 16; ++j) {
    uint32_t a[kFragments][4];
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const pair = &p[m][2 * j + i / 2][i % 2 * 2];
        a[m][i] = pack<T>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];  // dimensions 16 n on, then dimensions 16 n + 8 on
      ldmatrix_x4_trans(b, of_v + 16 * j * At::kPitch + At::ahead(chunk_v, n));
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        mma_m16n8k16<T>(o[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<T>(o[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// ----------------------------------------------------------------------------------------- softmax

// The four lanes that hold a row, together.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Scores s to capped ones in units of log 2: cap * tanh(x), where s * scale is 2 x in those units.
// The exponential has an absolute error of 1e-7 there, where tanh.approx has one of 5e-4.
template <int kColumns>
__device__ __forceinline__ void cap_scores(float (&s)[kFragments][kColumns][4], float scale,
                                           float cap) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[m][n][i] = cap - 2.0f * cap * reciprocal_approx(exp2_approx(s[m][n][i] * scale) + 1.0f);
      }
}

// Scores to weights exp2(s * scale - the largest of their row so far), whose sums go to `sums`;
// what was summed up before is scaled to that largest, `top` (in units of s).
template <int kColumns, int kOutputs>
__device__ __forceinline__ void softmax(float (&s)[kFragments][kColumns][4],
                                        float (&o)[kFragments][kOutputs][4],
                                        float (&top)[kFragments][2], RowSums& sums,
                                        int thread, float scale) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * half;
      float largest = top[m][half];
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        largest = fmaxf(largest, fmaxf(s[m][n][i], s[m][n][i + 1]));
      }
      largest = max_of_row(largest);
      // A row that has seen nothing yet must not subtract infinities.
      const float finite = largest == -kInfinity ? 0.0f : largest;
      // 1 where nothing is larger: of two products one may be fused, and they differ then.
      const float alpha = exp2_approx((top[m][half] - finite) * scale);
      const float base = finite * scale;
      top[m][half] = largest;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        s[m][n][i] = exp2_approx(s[m][n][i] * scale - base);
        s[m][n][i + 1] = exp2_approx(s[m][n][i + 1] * scale - base);
        sum += s[m][n][i] + s[m][n][i + 1];
      }
      float& total = sums[2 * m + half][thread];
      total = total * alpha + sum;
#pragma unroll
      for (int n = 0; n < kOutputs; ++n) {
        o[m][n][i] *= alpha;
        o[m][n][i + 1] *= alpha;
      }
    }
  }
}

}  // namespace longrope
}  // namespace
