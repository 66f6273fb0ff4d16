// The Python module longrope_kernels._native: the records of longrope_kernels/calls/records.py in,
// nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/append.h"
#include "cpu/instruction_sets.h"
#include "from_python.h"
#include "kind.h"
#include "overlap.h"
#include "selection.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using longrope_calls::ElementType;
using longrope_calls::from_python;
using longrope_calls::Heads;
using longrope_calls::Integers;
using longrope_calls::RotaryCall;
using longrope_calls::Tensor;
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

// From here on fresh memory is worth asking for huge pages.
constexpr int64_t kHuge = 4 << 20;

// Ask for huge pages below [address, address + bytes), memory that nothing has touched yet: a
// fresh output otherwise costs a page fault every 4 KiB, more than the rotation itself.
void advise_huge_pages(void* address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 2 << 20;
  const int64_t begin = (reinterpret_cast<int64_t>(address) + kPage - 1) / kPage * kPage;
  const int64_t end = (reinterpret_cast<int64_t>(address) + bytes) / kPage * kPage;
  if (bytes >= kHuge && end > begin) {
    madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
  }
#endif
}

// Below this many elements a second thread costs more than it saves (as in ATen).
constexpr int64_t kGrain = 32768;

int threads_for(int64_t elements, int most) { return elements < kGrain ? 1 : most; }

void ask_for_huge_pages(const Heads& heads, const RotaryCall& call) {
  if (heads.out.data == heads.in.data) return;
  const int64_t size = call.type == ElementType::kFloat32 ? 4 : 2;
  advise_huge_pages(heads.out.data, call.batch * call.seq * heads.heads * call.dim * size);
}

// Tokens that are read of a cache.
int64_t tokens_of(const Integers& lens, int32_t batch) {
  int64_t tokens = 0;
  for (int32_t i = 0; i < batch; ++i) tokens += longrope::element(lens, i);
  return tokens;
}

void rotary(py::handle call, py::handle q_out, py::handle k_out, int threads,
            const std::string& instruction_set) {
  const auto a = longrope_calls::rotary_call(call.ptr(), q_out.ptr(), k_out.ptr());
  const auto function = instruction_set_named(instruction_set).rotary;
  const int64_t elements = a.batch * a.seq * (a.q.heads + a.k.heads) * a.dim;
  if (elements == 0) return;
  py::gil_scoped_release release;
  ask_for_huge_pages(a.q, a);
  ask_for_huge_pages(a.k, a);
  function(a, threads_for(elements, threads));
}

void decode(py::handle call, py::handle out, py::handle lse, int threads,
            const std::string& instruction_set) {
  const auto a = longrope_calls::decode_call(call.ptr(), from_python<Tensor>(out),
                                             from_python<Tensor>(lse));
  const auto function = instruction_set_named(instruction_set).decode;
  if (a.batch == 0 || a.queries == 0 || a.heads == 0) return;
  const int64_t elements = tokens_of(a.keys.lens, a.batch) * a.kv_heads * a.dim;
  py::gil_scoped_release release;
  function(a, threads_for(elements, threads));
}

void append(py::handle call, int threads) {
  const auto a = longrope_calls::append_call(call.ptr());
  const int64_t elements = 2 * a.batch * a.tokens * a.heads * a.dim;
  py::gil_scoped_release release;
  longrope_cpu::append(a, threads_for(elements, threads));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of longrope_kernels; call them through the package.";
  longrope_calls::find_lender();
  m.def("instruction_sets", &instruction_sets, "What this processor runs, best first.");
  m.def("is_amd", &longrope_cpu::is_amd, "Whether AMD made this processor.");
  m.def("rotary", &rotary, "Rotate q and k: RotaryCall, outputs, threads, instruction set.");
  m.def("decode", &decode, "Attend to a cache: DecodeCall, out, lse, threads, instruction set.");
  m.def("kind_of", &longrope_calls::kind_of, "What is known of arguments without their values.");
  m.def("filled", &longrope_calls::filled, "A form with the tensors of arguments in their places.");
  m.def("clearly_apart", &longrope_calls::clearly_apart, "What is written, and what is read.");
  m.def("append", &append, "Write into a cache: AppendCall, threads.");
  m.def("ask_for_huge_pages", [](py::handle x) {
    const auto fresh = from_python<Tensor>(x);
    int64_t bytes = fresh.bits / 8;
    for (int32_t i = 0; i < fresh.dims; ++i) bytes *= fresh.shape[i];
    advise_huge_pages(fresh.data(), bytes);
  }, "Before anything touches a tensor that is contiguous.");
}
