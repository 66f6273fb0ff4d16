// The Python module longrope_kernels._cuda: addresses of device memory, sizes, strides and a stream
// in, nothing out. Built with LONGROPE_EMULATE it is longrope_kernels._cuda_emulated, for tests: the
// same kernels on the CPU, over host memory.
//
// Tensors come as plain addresses, so the module needs no libtorch and serves any torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>

#include "cuda/attention.h"
#include "cuda/decode.h"
#include "cuda/rotary.h"

#if defined(LONGROPE_EMULATE)
#include "emulator/machine.h"
#endif

namespace py = pybind11;
using longrope_cuda::AttentionArguments;
using longrope_cuda::DecodeArguments;
using longrope_cuda::ElementType;
using longrope_cuda::FactorSets;
using longrope_cuda::Heads;
using longrope_cuda::Integers;
using longrope_cuda::Place;
using longrope_cuda::RotaryArguments;
using longrope_cuda::Selection;
using longrope_cuda::TokenRows;

namespace {

template <size_t kCount>
using Strides = std::array<int64_t, kCount>;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

template <size_t kCount>
void copy_strides(const Strides<kCount>& from, int64_t (&to)[kCount]) {
  std::copy(from.begin(), from.end(), to);
}

// (address or 0, stride, are int64)
using IntegersTuple = std::tuple<int64_t, int64_t, bool>;

Integers integers(const IntegersTuple& x) {
  return {pointer<const void>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)};
}

// (count, pairs, steps, n_hat, attention_factor, max_length)
using FactorsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

FactorSets factor_sets(const FactorsTuple& x) {
  const auto [count, pairs, steps, n_hat, attention_factor, max_length] = x;
  return {count,
          pairs,
          pointer<const uint64_t>(steps),
          pointer<const int64_t>(n_hat),
          pointer<const double>(attention_factor),
          pointer<const int64_t>(max_length)};
}

// (device, stream)
using PlaceTuple = std::tuple<int, int64_t>;

Place place_of(const PlaceTuple& x) { return {std::get<0>(x), pointer<void>(std::get<1>(x))}; }

// (in, out, heads, strides of in, strides of out)
using HeadsTuple = std::tuple<int64_t, int64_t, int64_t, Strides<3>, Strides<3>>;

Heads heads(const HeadsTuple& x) {
  Heads result;
  result.in = pointer<const void>(std::get<0>(x));
  result.out = pointer<void>(std::get<1>(x));
  result.heads = std::get<2>(x);
  copy_strides(std::get<3>(x), result.in_strides);
  copy_strides(std::get<4>(x), result.out_strides);
  return result;
}

void rotary(const HeadsTuple& q, const HeadsTuple& k, int type, const Strides<3>& sizes,
            int64_t positions, bool positions_are_int64, const Strides<2>& position_strides,
            const FactorsTuple& factors, const IntegersTuple& lengths, const IntegersTuple& sets,
            const IntegersTuple& cu_seqlens, int64_t sequences, bool interleaved, bool conjugate,
            const PlaceTuple& place) {
  RotaryArguments a;
  a.q = heads(q);
  a.k = heads(k);
  a.type = static_cast<ElementType>(type);
  a.batch = sizes[0];
  a.seq = sizes[1];
  a.dim = sizes[2];
  a.positions = pointer<const void>(positions);
  a.positions_are_int64 = positions_are_int64;
  copy_strides(position_strides, a.position_strides);
  a.factors = factor_sets(factors);
  a.selection = {integers(lengths), integers(sets)};
  a.cu_seqlens = integers(cu_seqlens);
  a.sequences = sequences;
  a.interleaved = interleaved;
  a.conjugate = conjugate;
  py::gil_scoped_release release;
  longrope_cuda::rotary(a, place_of(place));
}

using StridedTuple = std::tuple<int64_t, Strides<3>>;

// Addresses may be 0 for what is not there. table: (address, strides, block_size); scales: address
// and stride of that of keys and of that of values; key_positions: (address, strides, are int64);
// selection: lengths, sets, and the stride of lengths between queries.
void decode(std::tuple<int, bool> types, const std::array<int32_t, 5>& sizes,
            const StridedTuple& q, const StridedTuple& out, int64_t lse, const StridedTuple& keys,
            const StridedTuple& values,
            const std::tuple<int64_t, Strides<2>, int32_t>& block_table,
            const std::array<int64_t, 4>& scales, const IntegersTuple& cache_lens,
            const IntegersTuple& kv_start,
            const std::tuple<int64_t, Strides<2>, bool>& key_positions,
            const FactorsTuple& factors,
            const std::tuple<IntegersTuple, IntegersTuple, int64_t>& selection, bool interleaved,
            float softmax_scale, int32_t window, float softcap,
            const std::array<int32_t, 3>& splits, const std::array<int64_t, 2>& scratch,
            const PlaceTuple& place) {
  DecodeArguments a;
  a.type = static_cast<ElementType>(std::get<0>(types));
  a.caches_are_float8 = std::get<1>(types);
  a.batch = sizes[0];
  a.queries = sizes[1];
  a.heads = sizes[2];
  a.kv_heads = sizes[3];
  a.dim = sizes[4];
  a.q = pointer<const void>(std::get<0>(q));
  copy_strides(std::get<1>(q), a.q_strides);
  a.out = pointer<void>(std::get<0>(out));
  copy_strides(std::get<1>(out), a.out_strides);
  a.lse = pointer<float>(lse);
  a.keys = pointer<const void>(std::get<0>(keys));
  copy_strides(std::get<1>(keys), a.key_strides);
  a.values = pointer<const void>(std::get<0>(values));
  copy_strides(std::get<1>(values), a.value_strides);
  a.block_table = pointer<const int32_t>(std::get<0>(block_table));
  copy_strides(std::get<1>(block_table), a.block_table_strides);
  a.block_size = std::get<2>(block_table);
  a.key_scale = pointer<const float>(scales[0]);
  a.key_scale_stride = scales[1];
  a.value_scale = pointer<const float>(scales[2]);
  a.value_scale_stride = scales[3];
  a.cache_lens = integers(cache_lens);
  a.kv_start = integers(kv_start);
  a.key_positions = pointer<const void>(std::get<0>(key_positions));
  copy_strides(std::get<1>(key_positions), a.key_position_strides);
  a.key_positions_are_int64 = std::get<2>(key_positions);
  a.factors = factor_sets(factors);
  a.selection = {integers(std::get<0>(selection)), integers(std::get<1>(selection))};
  a.length_stride = std::get<2>(selection);
  a.interleaved = interleaved;
  a.softmax_scale = softmax_scale;
  a.window = window;
  a.softcap = softcap;
  a.splits = {splits[0], splits[1], splits[2]};
  a.partial_out = pointer<float>(scratch[0]);
  a.partial_lse = pointer<float>(scratch[1]);
  py::gil_scoped_release release;
  longrope_cuda::decode(a, place_of(place));
}

TokenRows token_rows(const StridedTuple& x) {
  TokenRows rows;
  rows.data = pointer<const void>(std::get<0>(x));
  copy_strides(std::get<1>(x), rows.strides);
  return rows;
}

// sizes: batch, queries, keys, heads, kv_heads, dim. scores: softmax_scale, window, softcap.
void attention(int type, const std::array<int64_t, 6>& sizes, const StridedTuple& q,
               const StridedTuple& k, const StridedTuple& v, const StridedTuple& out,
               const std::tuple<int64_t, Strides<2>>& lse,
               const std::tuple<int64_t, Strides<2>, bool>& positions,
               const FactorsTuple& factors,
               const std::tuple<IntegersTuple, IntegersTuple>& selection,
               const std::tuple<IntegersTuple, IntegersTuple>& borders,
               const IntegersTuple& kv_start, int64_t sequences,
               const std::tuple<bool, bool>& interleaved_causal,
               const std::tuple<double, int64_t, double>& scores, int64_t stages,
               const PlaceTuple& place) {
  AttentionArguments a;
  a.type = static_cast<ElementType>(type);
  a.batch = sizes[0];
  a.queries = sizes[1];
  a.keys = sizes[2];
  a.heads = sizes[3];
  a.kv_heads = sizes[4];
  a.dim = sizes[5];
  a.q = token_rows(q);
  a.k = token_rows(k);
  a.v = token_rows(v);
  a.out = token_rows(out);
  a.lse = pointer<float>(std::get<0>(lse));
  copy_strides(std::get<1>(lse), a.lse_strides);
  a.positions = pointer<const void>(std::get<0>(positions));
  copy_strides(std::get<1>(positions), a.position_strides);
  a.positions_are_int64 = std::get<2>(positions);
  a.factors = factor_sets(factors);
  a.selection = {integers(std::get<0>(selection)), integers(std::get<1>(selection))};
  a.cu_seqlens = integers(std::get<0>(borders));
  a.cu_seqlens_k = integers(std::get<1>(borders));
  a.kv_start = integers(kv_start);
  a.sequences = sequences;
  std::tie(a.interleaved, a.causal) = interleaved_causal;
  std::tie(a.softmax_scale, a.window, a.softcap) = scores;
  a.stages = stages;
  py::gil_scoped_release release;
  longrope_cuda::attention(a, place_of(place));
}

}  // namespace

#if defined(LONGROPE_EMULATE)
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "Compiled CUDA kernels of longrope_kernels; call them through the package.";
  m.def("attention", &attention, "Attend; see csrc/cuda/attention.h for the arguments.");
#if defined(LONGROPE_EMULATE)
  m.def("order_warps",
        [](unsigned seed) { longrope_emulator::Machine::instance().order_seed = seed; });
#endif
  m.def("decode", &decode, "Attend to a cache; see csrc/cuda/decode.h for the arguments.");
  m.def("rotary", &rotary, "Rotate q and k; see csrc/cuda/rotary.h for the arguments.");
}
