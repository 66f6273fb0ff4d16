// Writing new keys and values into a cache, k and v in one launch.
//
// It is bound by memory, and at few tokens by its launch: each element is read once and written
// once. A thread takes one piece of 16 bytes of a row, a head of a token. Not measured on a GPU yet.
#include "append.h"

#include <stdexcept>

#include "../append.h"
#include "factor_sets.h"
#include "pieces.h"

namespace {
namespace longrope {

using longrope_calls::Scales;
using longrope_calls::TokenRows;

constexpr int kThreads = 256;

// What the cache holds: T, or float8.
template <typename T, bool kFloat8>
constexpr int kStoredBytes = kFloat8 ? 1 : static_cast<int>(sizeof(T));

// A piece of a row in float8, over the scale of its head.
template <typename Piece>
__device__ __forceinline__ void store_float8(const Piece& piece, float scale, uint8_t* p) {
  constexpr int kCount = Piece::kCount;
  float x[kCount];
  piece.get(x);
  if constexpr (kCount == 1) {
    *p = float8_of(x[0] / scale);
  } else {
    Words<kCount / 4> bytes;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) bytes.at[i] = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      bytes.at[i / 4] |= static_cast<uint32_t>(float8_of(x[i] / scale)) << (i % 4 * 8);
    }
    *reinterpret_cast<Words<kCount / 4>*>(p) = bytes;
  }
}

// -------------------------------------------------------------------------------------- the kernel

// Grid: pieces of all rows by blocks; y = 0 is k, 1 v.
template <typename T, bool kFloat8, typename Piece>
__global__ void __launch_bounds__(kThreads)
    append_kernel(const __grid_constant__ AppendCall a, const uint32_t pieces,
                  const uint32_t all) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= all) return;
  const uint32_t row = i / pieces, heads = static_cast<uint32_t>(a.heads);
  const int64_t d = static_cast<int64_t>(i - row * pieces) * Piece::kCount;
  const uint32_t of_all = row / heads, tokens = static_cast<uint32_t>(a.tokens);
  const int64_t head = row - of_all * heads;
  const int64_t batch = of_all / tokens, token = of_all % tokens;
  const AppendPlace place = place_of_token(a, batch, token);
  if (place.row < 0) return;

  const bool is_k = blockIdx.y == 0;
  const TokenRows& from = is_k ? a.k : a.v;
  const TokenRows& to = is_k ? a.cache.k : a.cache.v;
  const Scales& scales = is_k ? a.cache.k_scale : a.cache.v_scale;
  const T* const in = static_cast<const T*>(from.data) + batch * from.strides[0] +
                      token * from.strides[1] + head * from.strides[2] + d;
  unsigned char* const out =
      static_cast<unsigned char*>(to.data) +
      (place.row * to.strides[0] + place.slot * to.strides[1] + head * to.strides[2] + d) *
          kStoredBytes<T, kFloat8>;
  Piece piece;
  piece.load(in);
  if constexpr (kFloat8) {
    store_float8(piece, scales.data == nullptr ? 1.0f : scales.data[head * scales.stride], out);
  } else {
    piece.store(reinterpret_cast<T*>(out));
  }
}

// ---------------------------------------------------------------------------------------- the host

// Whether all rows are whole pieces, and begin where one can be read and written.
template <typename T, bool kFloat8>
bool rows_are_wide(const AppendCall& a) {
  constexpr int64_t kCount = WidePiece<T>::kCount;
  constexpr uintptr_t kBytes = kCount * kStoredBytes<T, kFloat8>;
  const auto whole = [](const TokenRows& x, const int64_t (&sizes)[3], uintptr_t bytes) {
    bool is = reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
    // A stride counts where it is taken.
    for (int i = 0; i < 3; ++i) is = is && (sizes[i] <= 1 || x.strides[i] % kCount == 0);
    return is;
  };
  const int64_t of_new[3] = {a.batch, a.tokens, a.heads};
  const int64_t of_cache[3] = {2, a.cache.slots, a.heads};
  return a.dim % kCount == 0 && whole(a.k, of_new, 16) && whole(a.v, of_new, 16) &&
         whole(a.cache.k, of_cache, kBytes) && whole(a.cache.v, of_cache, kBytes);
}

template <typename T, bool kFloat8, typename Piece>
void launch_append(const AppendCall& a, const char* name, void* stream) {
  const int64_t pieces = (a.dim + Piece::kCount - 1) / Piece::kCount;
  const int64_t all = a.batch * a.tokens * a.heads * pieces;
  if (all > UINT32_MAX - kThreads) throw std::invalid_argument("append: more than 2**32 pieces");
  const dim3 grid(static_cast<unsigned>((all + kThreads - 1) / kThreads), 2);
  longrope_cuda::launch(&append_kernel<T, kFloat8, Piece>, name, grid, dim3(kThreads), 0, stream,
                        a, static_cast<uint32_t>(pieces), static_cast<uint32_t>(all));
}

template <typename T, bool kFloat8>
void append_of(const AppendCall& a, void* stream) {
  if (rows_are_wide<T, kFloat8>(a)) {
    launch_append<T, kFloat8, WidePiece<T>>(a, "append_kernel", stream);
  } else {
    launch_append<T, kFloat8, OneElement<T>>(a, "append_kernel (element by element)", stream);
  }
}

template <typename T>
void append_of(const AppendCall& a, void* stream) {
  a.cache_is_float8 ? append_of<T, true>(a, stream) : append_of<T, false>(a, stream);
}

}  // namespace longrope
}  // namespace

namespace longrope_cuda {

void append(const AppendCall& a, const Place& place) {
  if (a.batch * a.tokens * a.heads * a.dim == 0) return;
  use_device(place.device);
  switch (a.type) {
    case longrope_calls::ElementType::kFloat32:
      return longrope::append_of<float>(a, place.stream);
    case longrope_calls::ElementType::kBFloat16:
      return longrope::append_of<longrope::BFloat16>(a, place.stream);
    case longrope_calls::ElementType::kFloat16:
      return longrope::append_of<longrope::Float16>(a, place.stream);
  }
}

}  // namespace longrope_cuda
