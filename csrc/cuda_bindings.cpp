// The Python module longrope_kernels._cuda: records of addresses of device memory, sizes and
// strides, and a stream in, nothing out. Built with LONGROPE_EMULATE it is
// longrope_kernels._cuda_emulated, for tests: the same kernels on the CPU, over host memory.
//
// Tensors come as plain addresses, so the module needs no libtorch and serves any torch.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/append.h"
#include "cuda/attention.h"
#include "cuda/decode.h"
#include "cuda/rotary.h"
#include "from_python.h"

#if defined(LONGROPE_EMULATE)
#include "emulator/machine.h"
#endif

namespace py = pybind11;
using longrope_calls::from_python;
using longrope_calls::load_fields;

namespace {

// (device, stream)
longrope_cuda::Place place_of(const py::tuple& from) {
  longrope_cuda::Place place;
  load_fields(from.ptr(), place.device, place.stream);
  return place;
}

void rotary(const py::tuple& call, const py::tuple& place) {
  const auto a = from_python<longrope_calls::RotaryCall>(call);
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::rotary(a, on);
}

void append(const py::tuple& call, const py::tuple& place) {
  const auto a = from_python<longrope_calls::AppendCall>(call);
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::append(a, on);
}

void attention(const py::tuple& call, int64_t stages, const py::tuple& place) {
  const auto a = from_python<longrope_calls::AttentionCall>(call);
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::attention(a, stages, on);
}

void decode(const py::tuple& call, const py::tuple& splits, const py::tuple& place) {
  const auto a = from_python<longrope_calls::DecodeCall>(call);
  longrope_cuda::Splits s;
  load_fields(splits.ptr(), s.even, s.most, s.least_tiles, s.out, s.lse, s.counters);
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::decode(a, s, on);
}

}  // namespace

#if defined(LONGROPE_EMULATE)
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "Compiled CUDA kernels of longrope_kernels; call them through the package.";
  m.def("append", &append, "Write into a cache: AppendCall, place.");
  m.def("attention", &attention, "Attend: AttentionCall, stages, place.");
#if defined(LONGROPE_EMULATE)
  m.def("order_warps",
        [](unsigned seed) { longrope_emulator::Machine::instance().order_seed = seed; });
#endif
  m.def("decode", &decode, "Attend to a cache: DecodeCall, splits, place.");
  m.def("rotary", &rotary, "Rotate q and k: RotaryCall, place.");
}
