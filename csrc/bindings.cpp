// The Python module longrope_kernels._native: addresses, sizes, strides and indices of sequences
// in, nothing out.
//
// Tensors come as plain addresses, so the module needs no libtorch and serves any torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/instruction_sets.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using longrope_cpu::DecodeArguments;
using longrope_cpu::ElementType;
using longrope_cpu::Heads;
using longrope_cpu::InstructionSet;
using longrope_cpu::RotaryArguments;

namespace {

template <typename T>
const T* pointer(int64_t address) {
  return reinterpret_cast<const T*>(address);
}

// One number for each sequence or query, by value: these are few, and a small tensor costs more to convert
// than to read. Empty for none.
using Indices = std::vector<int64_t>;

const int64_t* data_of(const Indices& x) { return x.empty() ? nullptr : x.data(); }

using HeadsTuple =
    std::tuple<int64_t, int64_t, int64_t, std::array<int64_t, 3>, std::array<int64_t, 3>>;

Heads heads(const HeadsTuple& x) {
  const auto& [in, out, count, in_strides, out_strides] = x;
  return {pointer<void>(in), reinterpret_cast<void*>(out), count, in_strides, out_strides};
}

std::vector<std::string> instruction_sets() {
  int count = 0;
  const auto* sets = longrope_cpu::instruction_sets(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i].name);
  return names;
}

const InstructionSet& instruction_set_named(const std::string& name) {
  int count = 0;
  const auto* sets = longrope_cpu::instruction_sets(&count);
  for (int i = 0; i < count; ++i) {
    if (name.empty() || name == sets[i].name) return sets[i];
  }
  throw std::invalid_argument("instruction_set: this processor or build has no " + name);
}

void rotary(const HeadsTuple& q, const HeadsTuple& k, int type, std::array<int64_t, 4> sizes,
            int64_t positions, bool positions_are_int64, std::array<int64_t, 2> position_strides,
            int64_t sets, std::array<int64_t, 4> tables, const Indices& lengths,
            const Indices& chosen_sets, const Indices& cu_seqlens, bool interleaved, bool conjugate,
            int threads, const std::string& instruction_set) {
  RotaryArguments a;
  a.q = heads(q);
  a.k = heads(k);
  a.type = static_cast<ElementType>(type);
  a.batch = sizes[0];
  a.seq = sizes[1];
  a.dim = sizes[2];
  a.pairs = sizes[3];
  a.positions = pointer<void>(positions);
  a.positions_are_int64 = positions_are_int64;
  a.position_strides = position_strides;
  a.sets = sets;
  a.steps = pointer<uint64_t>(tables[0]);
  a.n_hat = pointer<int64_t>(tables[1]);
  a.attention_factor = pointer<double>(tables[2]);
  a.max_length = pointer<int64_t>(tables[3]);
  a.lengths = data_of(lengths);
  a.chosen_sets = data_of(chosen_sets);
  a.cu_seqlens = data_of(cu_seqlens);
  a.sequences = static_cast<int64_t>(std::max(lengths.size(), chosen_sets.size()));
  a.interleaved = interleaved;
  a.conjugate = conjugate;
  a.threads = threads;
  const auto function = instruction_set_named(instruction_set).rotary;
  py::gil_scoped_release release;
  function(a);
}

using StridedTuple = std::tuple<int64_t, std::array<int64_t, 3>>;
using TableTuple = std::tuple<int64_t, std::array<int64_t, 2>>;

// Addresses may be 0 for what is not there.
void decode(int type, std::array<int64_t, 6> sizes, const StridedTuple& q, const StridedTuple& out,
            int64_t lse, const StridedTuple& keys, const StridedTuple& values,
            const TableTuple& block_table, int64_t block_size, const Indices& cache_lens,
            const Indices& kv_start, const TableTuple& key_positions, bool key_positions_are_int64,
            int64_t sets, std::array<int64_t, 4> tables, const Indices& lengths,
            const Indices& chosen_sets, bool interleaved, double softmax_scale, int64_t window,
            double softcap, int threads, const std::string& instruction_set) {
  DecodeArguments a;
  a.type = static_cast<ElementType>(type);
  a.batch = sizes[0];
  a.queries = sizes[1];
  a.heads = sizes[2];
  a.kv_heads = sizes[3];
  a.dim = sizes[4];
  a.pairs = sizes[5];
  a.q = pointer<void>(std::get<0>(q));
  a.q_strides = std::get<1>(q);
  a.out = reinterpret_cast<void*>(std::get<0>(out));
  a.out_strides = std::get<1>(out);
  a.lse = reinterpret_cast<float*>(lse);
  a.keys = pointer<void>(std::get<0>(keys));
  a.key_strides = std::get<1>(keys);
  a.values = pointer<void>(std::get<0>(values));
  a.value_strides = std::get<1>(values);
  a.block_table = pointer<int32_t>(std::get<0>(block_table));
  a.block_table_strides = std::get<1>(block_table);
  a.block_size = block_size;
  a.cache_lens = data_of(cache_lens);
  a.kv_start = data_of(kv_start);
  a.key_positions = pointer<void>(std::get<0>(key_positions));
  a.key_positions_are_int64 = key_positions_are_int64;
  a.key_position_strides = std::get<1>(key_positions);
  a.sets = sets;
  a.steps = pointer<uint64_t>(tables[0]);
  a.n_hat = pointer<int64_t>(tables[1]);
  a.attention_factor = pointer<double>(tables[2]);
  a.max_length = pointer<int64_t>(tables[3]);
  a.lengths = data_of(lengths);
  a.lengths_are_of_queries = lengths.size() > cache_lens.size();
  a.chosen_sets = data_of(chosen_sets);
  a.interleaved = interleaved;
  a.softmax_scale = softmax_scale;
  a.window = window;
  a.softcap = softcap;
  a.threads = threads;
  const auto function = instruction_set_named(instruction_set).decode;
  py::gil_scoped_release release;
  function(a);
}

// Ask for huge pages below [address, address + bytes), memory that nothing has touched yet: a
// fresh output otherwise costs a page fault every 4 KiB, more than the rotation itself.
void advise_huge_pages(int64_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  const int64_t begin = (address + kPage - 1) / kPage * kPage;
  const int64_t end = (address + bytes) / kPage * kPage;
  if (end > begin) {
    madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
  }
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of longrope_kernels; call them through the package.";
  m.def("instruction_sets", &instruction_sets, "What this processor runs, best first.");
  m.def("rotary", &rotary, "Rotate q and k; see csrc/cpu/rotary.h for the arguments.");
  m.def("decode", &decode, "Attend to a cache; see csrc/cpu/decode.h for the arguments.");
  m.def("advise_huge_pages", &advise_huge_pages);
}
