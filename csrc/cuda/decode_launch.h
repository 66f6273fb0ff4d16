// Split-KV decoding: the launches; included by the file of each type, so that they compile side by
// side.
#pragma once

#include <algorithm>
#include <cmath>

#include "decode_kernel.h"
#include "launch.h"

namespace {
namespace longrope {

// ---------------------------------------------------------------------------------------- the host

inline Divisor divisor_of(uint32_t divisor) {
  uint32_t shift = 0;
  while ((1ull << shift) < divisor) ++shift;
  const uint64_t multiplier = ((1ull << 32) * ((1ull << shift) - divisor)) / divisor + 1;
  return {divisor, static_cast<uint32_t>(multiplier), shift};
}

// Whether all rows of a cache are whole pieces of eight elements, and begin where one can be
// loaded.
inline bool rows_are_wide(const DecodeCall& a, const TokenRows& cache) {
  const uintptr_t bytes = a.caches_are_float8 ? 8 : 16;
  bool wide = reinterpret_cast<uintptr_t>(cache.data) % bytes == 0 && a.dim % 8 == 0;
  for (const int64_t stride : cache.strides) wide = wide && stride % 8 == 0;
  return wide;
}

template <typename T, int kDim, bool kFloat8>
void launch_decode(const DecodeCall& a, const Splits& splits, void* stream) {
  const int32_t rows = a.heads / a.kv_heads * a.queries;
  DecodePlan plan;
  plan.splits = splits;
  plan.block_size = divisor_of(static_cast<uint32_t>(a.keys.slots));
  plan.row_blocks = (rows + kDecodeRows - 1) / kDecodeRows;
  const Selection& selection = a.selection;
  const bool one_length = selection.lengths.data != nullptr && selection.lengths.strides[1] == 0;
  plan.several_sets = a.tables.sets > 1 && a.queries > 1 && selection.sets.data == nullptr &&
                      !one_length;
  const int64_t sets = plan.several_sets ? a.tables.sets : 1;
  plan.values_are_wide = rows_are_wide(a, a.keys.v);
  plan.keys_are_wide = rows_are_wide(a, a.keys.k) &&
                       (a.tables.interleaved || a.tables.pairs % 8 == 0);
  const float scale = static_cast<float>(a.scores.scale), cap = static_cast<float>(a.scores.cap);
  plan.scale = cap > 0.0f ? 2.0f * kLog2E * scale / cap : kLog2E * scale;
  plan.cap = cap > 0.0f ? kLog2E * cap : 0.0f;
  plan.window = static_cast<int32_t>(std::min<int64_t>(a.scores.window, 1 << 30));
  const dim3 grid(static_cast<unsigned>(sets * splits.most * a.batch * a.kv_heads *
                                        plan.row_blocks));
  longrope_cuda::launch(&decode_kernel<T, kDim, kFloat8>, "decode_kernel", grid, dim3(kThreads),
                        Shared<kDim>::kBytes, stream, a, plan);
}

template <typename T, int kDim>
void launch_decode(const DecodeCall& a, const Splits& splits, void* stream) {
  a.caches_are_float8 ? launch_decode<T, kDim, true>(a, splits, stream)
                      : launch_decode<T, kDim, false>(a, splits, stream);
}

template <typename T>
void decode_of(const DecodeCall& a, const Splits& splits, void* stream) {
  if (a.dim <= 64) return launch_decode<T, 64>(a, splits, stream);
  if (a.dim <= 128) return launch_decode<T, 128>(a, splits, stream);
  return launch_decode<T, 256>(a, splits, stream);
}

}  // namespace longrope
}  // namespace
