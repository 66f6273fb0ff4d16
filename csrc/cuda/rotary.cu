// The standalone rotation: q and k in one launch, forward and backward, in place or not.
//
// It is bound by memory: each element is read once and written once. A thread holds the cosines
// and sines of a few pairs of one token and uses them for all heads that its block takes, 16 bytes
// at a time, with the loads of four heads in flight. Neighbouring threads take the pieces of a row
// and then neighbouring tokens. Not measured on a GPU yet.
#include "rotary.h"

#include <algorithm>

#include "factor_sets.h"
#include "pieces.h"

namespace {
namespace longrope {

using longrope_calls::Heads;
using longrope_calls::RotaryCall;

constexpr int kThreads = 128;
constexpr int kHeadsInFlight = 4;
// Blocks that fill a GPU: about 130 multiprocessors, four blocks on each.
constexpr int64_t kFullGrid = 512;

// How the rows of a call are shared out; one thread takes one piece of `slots` heads' rows.
struct Tiling {
  int32_t pieces;       // of the rotated part of a row
  int32_t lanes;        // threads side by side on a row
  int32_t tokens;       // of a block
  int32_t head_slots;   // heads side by side
  int32_t block_heads;  // heads of a block, q's and then k's
  int32_t tiles;        // blocks for the tokens of a batch row
};

// ----------------------------------------------------------------------------- what a thread holds

// The pairs of a thread: two pieces, the first and the second dimensions of each.
template <typename Piece>
struct Halves {
  static constexpr int kPairs = Piece::kCount;
  Piece first, second;

  template <typename T>
  __device__ __forceinline__ void load(const T* row, int64_t at, int64_t apart) {
    first.load(row + at);
    second.load(row + at + apart);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t apart) const {
    first.store(row + at);
    second.store(row + at + apart);
  }
  __device__ __forceinline__ void get(float (&x)[kPairs], float (&y)[kPairs]) const {
    first.get(x);
    second.get(y);
  }
  __device__ __forceinline__ void set(const float (&x)[kPairs], const float (&y)[kPairs]) {
    first.set(x);
    second.set(y);
  }
};

// One piece, of pairs whose two dimensions are neighbours.
template <typename Piece>
struct Neighbours {
  static constexpr int kPairs = Piece::kCount / 2;
  Piece piece;

  template <typename T>
  __device__ __forceinline__ void load(const T* row, int64_t at, int64_t) {
    piece.load(row + at);
  }
  template <typename T>
  __device__ __forceinline__ void store(T* row, int64_t at, int64_t) const {
    piece.store(row + at);
  }
  __device__ __forceinline__ void get(float (&x)[kPairs], float (&y)[kPairs]) const {
    float both[2 * kPairs];
    piece.get(both);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x[i] = both[2 * i];
      y[i] = both[2 * i + 1];
    }
  }
  __device__ __forceinline__ void set(const float (&x)[kPairs], const float (&y)[kPairs]) {
    float both[2 * kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      both[2 * i] = x[i];
      both[2 * i + 1] = y[i];
    }
    piece.set(both);
  }
};

// -------------------------------------------------------------------------------------- the kernel

// Where the row of a head begins; k's heads follow those of q.
template <typename T>
struct Row {
  const T* in;
  T* out;
};

template <typename T>
__device__ __forceinline__ Row<T> row_of(const RotaryCall& a, int64_t batch, int64_t token,
                              int64_t head) {
  const bool of_q = head < a.q.heads;
  const Heads& x = of_q ? a.q : a.k;
  const int64_t i = of_q ? head : head - a.q.heads;
  return {static_cast<const T*>(x.in.data) + batch * x.in.strides[0] + token * x.in.strides[1] +
              i * x.in.strides[2],
          static_cast<T*>(x.out.data) + batch * x.out.strides[0] + token * x.out.strides[1] +
              i * x.out.strides[2]};
}

// a cos and a sin of some pairs of a token.
template <int kPairs>
__device__ __forceinline__ void token_cos_sin(const RotaryCall& a, int64_t batch, int64_t token,
                                   int64_t first_pair, float (&cos)[kPairs],
                                   float (&sin)[kPairs]) {
  const int64_t n = element(a.positions, batch, token);
  const int64_t set = set_of_token(a.tables, a.selection, batch, token);
  const TokenFactor of_token = factor_of_token(a.tables, set, n);
  const uint64_t* const steps =
      a.tables.steps + (2 * set + of_token.row) * a.tables.pairs + first_pair;
  const float sine_factor = a.conjugate ? -of_token.factor : of_token.factor;
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const CosSin turn = cos_sin(phase(n, steps[i]));
    cos[i] = of_token.factor * turn.cos;
    sin[i] = sine_factor * turn.sin;
  }
}

// Grid: (batch * tiles, groups of block_heads heads, groups of lanes where a row has more pieces).
// Held holds the pairs of a thread; Piece is what its rest is copied by.
template <typename T, typename Held, typename Piece>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const __grid_constant__ RotaryCall a, const __grid_constant__ Tiling tiling) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % tiling.lanes;
  const int32_t slot = static_cast<int32_t>(threadIdx.x) / tiling.lanes;
  const int32_t head_slot = slot / tiling.tokens;
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int64_t batch = block / tiling.tiles;
  const int64_t token =
      static_cast<int64_t>(block % tiling.tiles) * tiling.tokens + slot % tiling.tokens;
  if (head_slot >= tiling.head_slots || token >= a.seq) return;

  const int32_t piece = static_cast<int32_t>(blockIdx.z) * tiling.lanes + lane;
  const bool rotates = piece < tiling.pieces;
  const int64_t pair = static_cast<int64_t>(piece) * Held::kPairs;
  const int64_t at = a.tables.interleaved ? 2 * pair : pair;
  const int64_t apart = a.tables.interleaved ? 1 : a.tables.pairs;
  const int64_t rest = 2 * a.tables.pairs + static_cast<int64_t>(piece) * Piece::kCount;
  const int64_t rest_stride = static_cast<int64_t>(gridDim.z) * tiling.lanes * Piece::kCount;

  const int64_t heads = a.q.heads + a.k.heads;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * tiling.block_heads;
  const int64_t end = min(first + tiling.block_heads, heads);
  const int32_t stride = tiling.head_slots;

  Held held[kHeadsInFlight];
  const auto load = [&](int64_t head) {
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i) {
      if (rotates && head + i * stride < end) {
        held[i].load(row_of<T>(a, batch, token, head + i * stride).in, at, apart);
      }
    }
  };

  // The first loads come before the chain of loads that ends in cosines and sines.
  int64_t head = first + head_slot;
  load(head);
  float cos[Held::kPairs], sin[Held::kPairs];
  if (rotates) token_cos_sin(a, batch, token, pair, cos, sin);
  while (head < end) {
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i) {
      const int64_t one = head + i * stride;
      if (one < end) {
        const Row<T> row = row_of<T>(a, batch, token, one);
        if (rotates) {
          float x[Held::kPairs], y[Held::kPairs];
          held[i].get(x, y);
#pragma unroll
          for (int j = 0; j < Held::kPairs; ++j) {
            const float turned = x[j] * cos[j] - y[j] * sin[j];
            y[j] = x[j] * sin[j] + y[j] * cos[j];
            x[j] = turned;
          }
          held[i].set(x, y);
          held[i].store(row.out, at, apart);
        }
        if (row.in != row.out) {
          for (int64_t d = rest; d < a.dim; d += rest_stride) {
            Piece copied;
            copied.load(row.in + d);
            copied.store(row.out + d);
          }
        }
      }
    }
    head += static_cast<int64_t>(kHeadsInFlight) * stride;
    load(head);
  }
}

// ---------------------------------------------------------------------------------------- the host

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Tiling tiling_of(const RotaryCall& a, int64_t pieces, int64_t rest_pieces) {
  const int64_t heads = a.q.heads + a.k.heads;
  Tiling t;
  t.pieces = static_cast<int32_t>(pieces);
  t.lanes = static_cast<int32_t>(
      std::min<int64_t>(std::max<int64_t>({pieces, rest_pieces, 1}), kThreads));
  t.tokens = static_cast<int32_t>(std::min<int64_t>(kThreads / t.lanes, a.seq));
  t.tiles = static_cast<int32_t>(ceil_div(a.seq, t.tokens));
  t.head_slots =
      static_cast<int32_t>(std::min<int64_t>(kThreads / (t.lanes * t.tokens), heads));
  // All heads in one block where tokens alone fill the GPU: then cosine and sine are computed once
  // per token and pair. Fewer where they do not.
  const int64_t at_once = static_cast<int64_t>(t.head_slots) * kHeadsInFlight;
  const int64_t groups = ceil_div(heads, at_once);
  const int64_t splits = std::min(groups, ceil_div(kFullGrid, a.batch * t.tiles));
  t.block_heads = static_cast<int32_t>(ceil_div(groups, splits) * at_once);
  return t;
}

template <typename T, typename Held, typename Piece>
void launch_rotary(const RotaryCall& a, const char* name, void* stream) {
  const int64_t pieces = ceil_div(a.tables.pairs, Held::kPairs);
  const bool copies = a.q.in.data != a.q.out.data || a.k.in.data != a.k.out.data;
  const int64_t rest = copies ? a.dim - 2 * a.tables.pairs : 0;
  const int64_t rest_pieces = ceil_div(rest, Piece::kCount);
  const Tiling t = tiling_of(a, pieces, rest_pieces);
  const dim3 grid(static_cast<unsigned>(a.batch * t.tiles),
                  static_cast<unsigned>(ceil_div(a.q.heads + a.k.heads, t.block_heads)),
                  static_cast<unsigned>(ceil_div(std::max<int64_t>(pieces, 1), t.lanes)));
  longrope_cuda::launch(&rotary_kernel<T, Held, Piece>, name, grid, dim3(kThreads), 0, stream, a,
                        t);
}

// Whether all rows begin at 16 bytes, and so do the parts of a row.
template <typename T>
bool rows_are_wide(const RotaryCall& a) {
  constexpr int64_t kCount = 16 / sizeof(T);
  const auto whole = [](int64_t n) { return n % kCount == 0; };
  const auto heads_are = [&](const Heads& x) {
    bool wide = x.heads == 0 || (reinterpret_cast<uintptr_t>(x.in.data) % 16 == 0 &&
                                 reinterpret_cast<uintptr_t>(x.out.data) % 16 == 0);
    // A stride counts where it is taken.
    const int64_t sizes[] = {a.batch, a.seq, x.heads};
    for (int i = 0; i < 3; ++i) {
      wide = wide && (sizes[i] <= 1 || (whole(x.in.strides[i]) && whole(x.out.strides[i])));
    }
    return wide;
  };
  const int64_t rotated = a.tables.interleaved ? 2 * a.tables.pairs : a.tables.pairs;
  return whole(rotated) && whole(a.dim) && heads_are(a.q) && heads_are(a.k);
}

template <typename T>
void rotary_of(const RotaryCall& a, void* stream) {
  using Wide = WidePiece<T>;
  using One = OneElement<T>;
  if (!rows_are_wide<T>(a)) {
    launch_rotary<T, Halves<One>, One>(a, "rotary_kernel (element by element)", stream);
  } else if (a.tables.interleaved) {
    launch_rotary<T, Neighbours<Wide>, Wide>(a, "rotary_kernel (interleaved)", stream);
  } else {
    launch_rotary<T, Halves<Wide>, Wide>(a, "rotary_kernel", stream);
  }
}

}  // namespace longrope
}  // namespace

namespace longrope_cuda {

void rotary(const RotaryCall& a, const Place& place) {
  if (a.batch == 0 || a.seq == 0 || a.q.heads + a.k.heads == 0) return;
  use_device(place.device);
  switch (a.type) {
    case longrope_calls::ElementType::kFloat32:
      return longrope::rotary_of<float>(a, place.stream);
    case longrope_calls::ElementType::kBFloat16:
      return longrope::rotary_of<longrope::BFloat16>(a, place.stream);
    case longrope_calls::ElementType::kFloat16:
      return longrope::rotary_of<longrope::Float16>(a, place.stream);
  }
}

}  // namespace longrope_cuda
