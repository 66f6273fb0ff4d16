// FlashAttention over q that comes unrotated and k that the standalone rotation has turned before.
//
// A block of four warps takes 128 queries of one head. They are rotated once, in shared memory, in
// the prologue, while the first tiles of keys are on their way. Tiles of keys and values then take
// turns in a ring of two to four places: while one is used, the next are copied. The only steps are
// mma.sync and cp.async of compute capability 8.0, so the kernel runs on all later GPUs. Masks cost
// a branch in the tiles that need none. Not measured on a GPU yet.
#include "attention.h"

#include <algorithm>

#include "attention_tile.h"
#include "factor_sets.h"

namespace {
namespace longrope {

using longrope_calls::AttentionCall;
using longrope_calls::TokenRows;

// How a call is shared out, and its numbers as the kernel wants them.
struct Tiling {
  int tiles;         // of a head, over all packed sequences
  int section;       // heads that run together
  int heads_of_all;  // of all batch rows
  int window;        // 0: none
  int stages;
  float scale;      // of scores to units of log 2
  float cap;        // in units of log 2, or 0
  float cap_scale;  // see cap_scores
};

// ------------------------------------------------------------------------------------ the sequence

// The queries of a block: a tile of one sequence of one head.
struct Work {
  int64_t batch;
  int head;
  int64_t sequence;
  int first_query;  // in the sequence
  int64_t begin_q;  // of the sequence in q
  int64_t begin_k;
  int queries;  // of the sequence
  int keys;
};

// In the order "longest first": tiles from the last, which sees most keys when causal. Heads run
// fastest, in sections whose k and v fit the L2 cache together.
__device__ __forceinline__ Work work_of_block(const AttentionCall& a, const Tiling& tiling) {
  const int place = static_cast<int>(blockIdx.x);
  const int of_section = tiling.tiles * tiling.section;
  const int first_head = place / of_section * tiling.section;
  const int width = min(tiling.section, tiling.heads_of_all - first_head);
  const int in_section = place % of_section;
  const int head = first_head + in_section % width;
  int tile = tiling.tiles - 1 - in_section / width;

  Work work;
  work.batch = head / a.heads;
  work.head = head % a.heads;
  work.sequence = work.batch;
  work.begin_q = work.begin_k = 0;
  work.queries = a.queries;
  work.keys = a.keys.slots;
  if (a.selection.borders.data != nullptr) {
    // Sequence b has the tiles from cu[b] / kBlockM + b on, at least as many as it needs.
    int first = 0, last = static_cast<int>(a.selection.sequences) - 1;
    while (first < last) {
      const int middle = (first + last + 1) / 2;
      const int begin = static_cast<int>(element(a.selection.borders, middle));
      if (begin / kBlockM + middle <= tile) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    work.sequence = first;
    work.begin_q = element(a.selection.borders, first);
    work.begin_k = element(a.keys.borders, first);
    work.queries = static_cast<int>(element(a.selection.borders, first + 1) - work.begin_q);
    work.keys = static_cast<int>(element(a.keys.borders, first + 1) - work.begin_k);
    tile -= static_cast<int>(work.begin_q) / kBlockM + first;
  }
  work.first_query = tile * kBlockM;
  return work;
}

template <typename T>
__device__ __forceinline__ T* rows_of(const TokenRows& x, int64_t batch, int64_t token,
                                      int64_t head) {
  T* const data = static_cast<T*>(x.data);
  return data + batch * x.strides[0] + token * x.strides[1] + head * x.strides[2];
}

// Which keys the queries of a tile see, of slots; those from all_begin to all_end are seen by all.
struct Range {
  int begin;
  int end;
  int all_begin;
  int all_end;
  int first_key;
};

__device__ __forceinline__ Range keys_of_tile(const AttentionCall& a, const Work& work,
                                              int window) {
  const int shift = work.keys - work.queries;
  const int first = work.first_query + shift;
  const int last = min(work.first_query + kBlockM, work.queries) - 1 + shift;
  Range range;
  range.first_key = 0;
  if (a.keys.start.data != nullptr) {
    const int64_t start = element(a.keys.start, work.sequence);
    range.first_key = static_cast<int>(min(max(start, static_cast<int64_t>(0)),
                                           static_cast<int64_t>(work.keys)));
  }
  range.begin = range.all_begin = range.first_key;
  range.end = range.all_end = work.keys;
  if (a.scores.causal) {
    range.end = min(range.end, last + 1);
    range.all_end = min(range.all_end, first + 1);
  }
  if (window > 0) {
    range.begin = max(range.begin, first - window + 1);
    range.all_begin = max(range.all_begin, last - window + 1);
    if (!a.scores.causal) {
      range.end = min(range.end, last + window);
      range.all_end = min(range.all_end, first + window);
    }
  }
  return range;
}

// What all threads of a block have in common. It lies in shared memory, as the registers are full.
template <typename T>
struct Shared {
  Work work;
  Range range;
  int first_tile;  // of keys
  int end_tile;
  const T* k;  // of the sequence and the head
  const T* v;
};

template <typename T, int kDim>
__device__ __forceinline__ void describe(const AttentionCall& a, const Tiling& tiling,
                                         Shared<T>& shared) {
  const Work work = work_of_block(a, tiling);
  const Range range = keys_of_tile(a, work, tiling.window);
  const int kv_head = work.head / (a.heads / a.kv_heads);
  shared.work = work;
  shared.range = range;
  shared.first_tile = max(range.begin, 0) / kBlockN<kDim>;
  shared.end_tile = (range.end + kBlockN<kDim> - 1) / kBlockN<kDim>;
  shared.k = rows_of<const T>(a.keys.k, work.batch, work.begin_k, kv_head);
  shared.v = rows_of<const T>(a.keys.v, work.batch, work.begin_k, kv_head);
}

// Hides the keys of a tile at slot j0 that the queries must not see.
template <int kColumns>
__device__ __forceinline__ void hide(float (&s)[kFragments][kColumns][4], const Range& range,
                                     int keys, bool causal, int window, int slot, int j0,
                                     int lane) {
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = slot + 16 * m + 8 * half + (lane >> 2);
      int begin = range.first_key, end = causal ? min(keys, at + 1) : keys;
      if (window > 0) {
        begin = max(begin, at - window + 1);
        if (!causal) end = min(end, at + window);
      }
      // Of the columns that this lane holds: 2 (lane % 4) and the next, of every eight.
      begin -= j0 + 2 * (lane & 3);
      end -= j0 + 2 * (lane & 3);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + i;
          if (column < begin || column >= end) s[m][n][2 * half + i] = -kInfinity;
        }
    }
  }
}

// ------------------------------------------------------------------------------------ the rotation

template <typename T>
__device__ __forceinline__ void turn(float& x, float& y, int64_t n, uint64_t step, float factor) {
  // Rounded to 16 bits right after, so that the hardware's sine is good enough.
  const float angle = static_cast<float>(static_cast<int32_t>(phase(n, step))) *
                      1.4629180792671596e-9f;  // 2 pi / 2^32
  const float cos = factor * cos_approx(angle), sin = factor * sin_approx(angle);
  const float turned = x * cos - y * sin;
  y = x * sin + y * cos;
  x = turned;
}

// Two words of two elements each: pairs (x's, y's) of a row, or both dimensions of pairs.
template <typename T>
__device__ __forceinline__ void turn_words(uint32_t& x, uint32_t& y, bool interleaved, int64_t n,
                                           const uint64_t* steps, int left, float factor) {
  float2 a = unpack<T>(x), b = unpack<T>(y);
  if (interleaved) {
    if (left > 0) turn<T>(a.x, a.y, n, steps[0], factor);
    if (left > 1) turn<T>(b.x, b.y, n, steps[1], factor);
  } else {
    turn<T>(a.x, b.x, n, steps[0], factor);
    turn<T>(a.y, b.y, n, steps[1], factor);
  }
  x = pack<T>(a.x, a.y);
  y = pack<T>(b.x, b.y);
}

// Rotates row `row` of a tile of queries in shared memory, the query at position n.
template <typename T, int kDim>
__device__ __forceinline__ void rotate_row(unsigned char* tile, int row, int64_t n,
                                           const uint64_t* steps, int pairs, bool interleaved,
                                           float factor) {
  using At = Layout<kDim>;
  using Chunk = Words<4>;
  if (interleaved) {
#pragma unroll 1
    for (int first = 0; first < pairs; first += 4) {
      auto& chunk = *reinterpret_cast<Chunk*>(tile + At::offset(row, first / 4));
      Chunk x = chunk;
      turn_words<T>(x.at[0], x.at[1], true, n, steps + first, pairs - first, factor);
      turn_words<T>(x.at[2], x.at[3], true, n, steps + first + 2, pairs - first - 2, factor);
      chunk = x;
    }
  } else if (pairs % 8 == 0) {
#pragma unroll 1
    for (int first = 0; first < pairs; first += 8) {
      auto& chunk_i = *reinterpret_cast<Chunk*>(tile + At::offset(row, first / 8));
      auto& chunk_j = *reinterpret_cast<Chunk*>(tile + At::offset(row, (first + pairs) / 8));
      Chunk x = chunk_i, y = chunk_j;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        turn_words<T>(x.at[i], y.at[i], false, n, steps + first + 2 * i, 2, factor);
      }
      chunk_i = x;
      chunk_j = y;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < pairs; ++i) {
      const int j = i + pairs;
      auto& low = *reinterpret_cast<uint16_t*>(tile + At::offset(row, i / 8) + i % 8 * 2);
      auto& high = *reinterpret_cast<uint16_t*>(tile + At::offset(row, j / 8) + j % 8 * 2);
      float2 pair = unpack<T>(low | static_cast<uint32_t>(high) << 16);
      turn<T>(pair.x, pair.y, n, steps[i], factor);
      const uint32_t turned = pack<T>(pair.x, pair.y);
      low = static_cast<uint16_t>(turned);
      high = static_cast<uint16_t>(turned >> 16);
    }
  }
}

template <typename T, int kDim>
__device__ __forceinline__ void rotate_query(const AttentionCall& a, const Work& work,
                                             unsigned char* tile, int row) {
  const int64_t token = work.begin_q + work.first_query + row;
  const int64_t n = element(a.positions, work.batch, token);
  const int64_t set = set_of_sequence(a.tables, a.selection, work.sequence);
  const TokenFactor factor = factor_of_token(a.tables, set, n);
  rotate_row<T, kDim>(tile, row, n, a.tables.steps + (2 * set + factor.row) * a.tables.pairs,
                      static_cast<int>(a.tables.pairs), a.tables.interleaved, factor.factor);
}

// -------------------------------------------------------------------------------------- the kernel

// Grid: (tiles * heads of all batch rows). Shared memory: the queries, then the ring of tiles.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kernel(const __grid_constant__ AttentionCall a,
                     const __grid_constant__ Tiling tiling) {
  using At = Layout<kDim>;
  constexpr int kN = kBlockN<kDim>;
  constexpr int kTileBytes = kN * At::kPitch;
  __shared__ Shared<T> shared;
  __shared__ RowSums sums;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int first_row = thread / 32 * kWarpRows;  // of the warp, in the tile
  const int dim = static_cast<int>(a.dim);
  unsigned char* const tile_q = dynamic_shared();
  unsigned char* const ring = tile_q + kBlockM * At::kPitch;
  if (thread == 0) describe<T, kDim>(a, tiling, shared);
  __syncthreads();
  if (shared.work.first_query >= shared.work.queries) return;

  // The tiles of a sequence take turns: keys, then values, then the keys after them. Copies one
  // into a place of the ring; past the last, nothing.
  const auto fetch = [&](int turn, int place) {
    if (turn < 2 * shared.end_tile) {
      const bool of_v = (turn & 1) != 0;
      copy_rows<kDim, kN, kThreads>(ring + place * kTileBytes, of_v ? shared.v : shared.k,
                                    of_v ? a.keys.v.strides[1] : a.keys.k.strides[1], turn / 2 * kN,
                                    shared.work.keys, dim, thread);
    }
    cp_async_commit();
  };

  {
    const Work& work = shared.work;
    copy_rows<kDim, kBlockM, kThreads>(
        tile_q, rows_of<const T>(a.q, work.batch, work.begin_q, work.head), a.q.strides[1],
        work.first_query, work.queries, dim, thread);
    cp_async_commit();
    for (int i = 0; i < tiling.stages - 1; ++i) fetch(2 * shared.first_tile + i, i);
    wait_for_tile<1>(tiling.stages);
    __syncthreads();
    // A thread for each row.
    if (work.first_query + thread < work.queries) {
      rotate_query<T, kDim>(a, work, tile_q, thread);
    }
  }

  float o[kFragments][kDim / 8][4], top[kFragments][2];
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[m][half] = -kInfinity;
      sums[2 * m + half][thread] = 0.0f;
    }
  }

  int place = 0;  // of the next turn, in the ring
  // Waits for a tile, and copies another one to where the last was, which all warps have left
  // behind when they meet here.
  const auto next_tile = [&](int turn) -> const unsigned char* {
    wait_for_tile<0>(tiling.stages);
    __syncthreads();
    fetch(turn + tiling.stages - 1, (place == 0 ? tiling.stages : place) - 1);
    const unsigned char* const tile = ring + place * kTileBytes;
    place = place + 1 == tiling.stages ? 0 : place + 1;
    return tile;
  };

#pragma unroll 1
  for (int tile = shared.first_tile; tile < shared.end_tile; ++tile) {
    float s[kFragments][kN / 8][4];
    score<T, kDim>(s, tile_q + first_row * At::kPitch, next_tile(2 * tile), lane);
    const unsigned char* const values = next_tile(2 * tile + 1);
    if (tiling.cap > 0.0f) cap_scores(s, tiling.cap_scale, tiling.cap);
    const int j0 = tile * kN;
    if (j0 < shared.range.all_begin || j0 + kN > shared.range.all_end) {
      const Work& work = shared.work;
      const int slot = work.first_query + first_row + work.keys - work.queries;
      hide(s, shared.range, work.keys, a.scores.causal, tiling.window, slot, j0, lane);
    }
    softmax(s, o, top, sums, thread, tiling.scale);
    add_values<T, kDim>(o, s, values, lane);
  }
  cp_async_wait<0>();

  // Through the warp's own rows of the queries, so that whole rows are stored at once.
  const Work& work = shared.work;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * m + 8 * half + (lane >> 2);
      float sum = sum_of_row(sums[2 * m + half][thread]);
      if (sum == 0.0f) sum = 1.0f;  // nothing is seen: 0, and a log-sum-exp of -inf
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(tile_q + At::offset(row, n) + 4 * (lane & 3)) =
            pack<T>(o[m][n][2 * half] * inverse, o[m][n][2 * half + 1] * inverse);
      }
      const int query = work.first_query + row;
      if ((lane & 3) == 0 && query < work.queries) {
        constexpr float kLn2 = 0.69314718055994531f;
        a.lse[work.batch * a.lse_strides[0] + work.head * a.lse_strides[1] + work.begin_q + query] =
            (top[m][half] * tiling.scale + log2_approx(sum)) * kLn2;
      }
    }
  }
  __syncwarp();
  T* const out = rows_of<T>(a.out, work.batch, work.begin_q + work.first_query, work.head);
#pragma unroll
  for (int i = 0; i < kWarpRows; i += 32 / At::kLanes) {
    const int row = first_row + i + lane / At::kLanes;
    if (work.first_query + row >= work.queries) continue;
#pragma unroll
    for (int group = 0; group < At::kGroups; ++group) {
      const int chunk = group * At::kLanes + lane % At::kLanes;
      if (8 * chunk < dim) {
        *reinterpret_cast<Words<4>*>(out + row * a.out.strides[1] + 8 * chunk) =
            *reinterpret_cast<const Words<4>*>(tile_q + At::offset(row, chunk));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- the host

// k and v of the heads that run together: about what the L2 of an A100 (40 MB) or H100 (50 MB)
// holds beside everything else.
constexpr int64_t kSectionBytes = 32 << 20;
constexpr int64_t kMostStages = 4;

template <int kDim>
constexpr int64_t shared_bytes(int64_t stages) {
  return (kBlockM + stages * kBlockN<kDim>) * Layout<kDim>::kPitch;
}

// The deepest ring that leaves a multiprocessor as many blocks as the shallowest does, at most the
// two that the registers allow.
template <int kDim>
int64_t choose_stages(int device) {
#if defined(LONGROPE_EMULATE)
  (void)device;
  return kMostStages;
#else
  int of_multiprocessor = 0, of_block = 0;
  longrope_cuda::check(
      cudaDeviceGetAttribute(&of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                             device),
      "cudaDeviceGetAttribute");
  longrope_cuda::check(
      cudaDeviceGetAttribute(&of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "cudaDeviceGetAttribute");
  // Of each block, beside the tiles: what the system takes, and what the kernel declares.
  constexpr int64_t kReserved = 1024 + sizeof(RowSums) + sizeof(Shared<BFloat16>);
  const auto blocks = [&](int64_t stages) {
    return std::min<int64_t>(2, of_multiprocessor / (shared_bytes<kDim>(stages) + kReserved));
  };
  int64_t stages = kMostStages;
  while (stages > 2 && (blocks(stages) < blocks(2) || shared_bytes<kDim>(stages) > of_block)) {
    --stages;
  }
  return stages;
#endif
}

template <typename T, int kDim>
void launch_attention(const AttentionCall& a, int64_t stages,
                      const longrope_cuda::Place& place) {
  constexpr double kLog2E = 1.4426950408889634;
  const bool packed = a.selection.borders.data != nullptr;
  Tiling t;
  t.tiles = static_cast<int>(packed ? a.queries / kBlockM + a.selection.sequences
                                    : (a.queries + kBlockM - 1) / kBlockM);
  t.heads_of_all = static_cast<int>(packed ? a.heads : a.heads * a.batch);
  const int64_t of_kv_head = 2 * int64_t{a.keys.slots} * a.dim * static_cast<int64_t>(sizeof(T));
  const int64_t section =
      std::max<int64_t>(1, kSectionBytes / of_kv_head) * (a.heads / a.kv_heads);
  t.section = static_cast<int>(std::min<int64_t>(section, t.heads_of_all));
  const int64_t all = int64_t{a.queries} + a.keys.slots;
  t.window = static_cast<int>(std::min(a.scores.window, all));
  t.stages = static_cast<int>(stages == 0 ? choose_stages<kDim>(place.device) : stages);
  // A scale of 0 would make NaN of scores that are hidden.
  t.scale = std::max(static_cast<float>(kLog2E * a.scores.scale),
                     std::numeric_limits<float>::min());
  t.cap = t.cap_scale = 0.0f;
  if (a.scores.cap > 0.0) {
    t.cap = static_cast<float>(kLog2E * a.scores.cap);
    t.cap_scale = static_cast<float>(2.0 * kLog2E * a.scores.scale / a.scores.cap);
    t.scale = 1.0f;
  }
  const dim3 grid(static_cast<unsigned>(t.tiles) * static_cast<unsigned>(t.heads_of_all));
  longrope_cuda::launch(&attention_kernel<T, kDim>, "attention_kernel", grid, dim3(kThreads),
                        static_cast<size_t>(shared_bytes<kDim>(t.stages)), place.stream, a, t);
}

template <typename T>
void attention_of(const AttentionCall& a, int64_t stages, const longrope_cuda::Place& place) {
  if (a.dim <= 64) return launch_attention<T, 64>(a, stages, place);
  if (a.dim <= 96) return launch_attention<T, 96>(a, stages, place);
  launch_attention<T, 128>(a, stages, place);
}

}  // namespace longrope
}  // namespace

namespace longrope_cuda {

void attention(const AttentionCall& a, int64_t stages, const Place& place) {
  use_device(place.device);
  if (a.type == longrope_calls::ElementType::kBFloat16) {
    return longrope::attention_of<longrope::BFloat16>(a, stages, place);
  }
  longrope::attention_of<longrope::Float16>(a, stages, place);
}

}  // namespace longrope_cuda
