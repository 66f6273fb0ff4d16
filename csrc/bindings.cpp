// The Python module longrope_kernels._native: records of addresses, sizes and strides in, nothing
// out.
//
// Tensors come as plain addresses, so the module needs no libtorch and serves any torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/append.h"
#include "cpu/instruction_sets.h"
#include "from_python.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using longrope_cpu::InstructionSet;

namespace {

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

void rotary(const py::tuple& call, int threads, const std::string& instruction_set) {
  const auto a = longrope_calls::from_python<longrope_calls::RotaryCall>(call);
  const auto function = instruction_set_named(instruction_set).rotary;
  py::gil_scoped_release release;
  function(a, threads);
}

void decode(const py::tuple& call, int threads, const std::string& instruction_set) {
  const auto a = longrope_calls::from_python<longrope_calls::DecodeCall>(call);
  const auto function = instruction_set_named(instruction_set).decode;
  py::gil_scoped_release release;
  function(a, threads);
}

void append(const py::tuple& call, int threads) {
  const auto a = longrope_calls::from_python<longrope_calls::AppendCall>(call);
  py::gil_scoped_release release;
  longrope_cpu::append(a, threads);
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
  m.def("rotary", &rotary, "Rotate q and k: RotaryCall, threads, instruction set.");
  m.def("decode", &decode, "Attend to a cache: DecodeCall, threads, instruction set.");
  m.def("append", &append, "Write into a cache: AppendCall, threads.");
  m.def("advise_huge_pages", &advise_huge_pages);
}
