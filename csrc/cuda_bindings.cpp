// The Python module longrope_kernels._cuda: the records of longrope_kernels/calls/records.py and a
// stream in, nothing out. Built with LONGROPE_EMULATE it is longrope_kernels._cuda_emulated, for
// tests: the same kernels on the CPU, over host memory.
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
using longrope_calls::Tensor;

namespace {

// (device, stream)
longrope_cuda::Place place_of(const py::tuple& from) {
  longrope_cuda::Place place;
  load_fields(from.ptr(), place.device, place.stream);
  return place;
}

void rotary(py::handle call, py::handle q_out, py::handle k_out, const py::tuple& place) {
  const auto a = longrope_calls::rotary_call(call.ptr(), q_out.ptr(), k_out.ptr());
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::rotary(a, on);
}

void append(py::handle call, const py::tuple& place) {
  const auto a = longrope_calls::append_call(call.ptr());
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::append(a, on);
}

void attention(py::handle call, py::handle out, py::handle lse, int64_t stages,
               const py::tuple& place) {
  const auto a = longrope_calls::attention_call(call.ptr(), from_python<Tensor>(out),
                                                from_python<Tensor>(lse));
  const auto on = place_of(place);
  py::gil_scoped_release release;
  longrope_cuda::attention(a, stages, on);
}

void decode(py::handle call, py::handle out, py::handle lse, const py::tuple& splits,
            const py::tuple& place) {
  const auto a = longrope_calls::decode_call(call.ptr(), from_python<Tensor>(out),
                                             from_python<Tensor>(lse));
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
  longrope_calls::find_lender();
  m.def("append", &append, "Write into a cache: AppendCall, place.");
  m.def("attention", &attention, "Attend: AttentionCall, out, lse, stages, place.");
#if defined(LONGROPE_EMULATE)
  m.def("order_warps",
        [](unsigned seed) { longrope_emulator::Machine::instance().order_seed = seed; });
#endif
  m.def("decode", &decode, "Attend to a cache: DecodeCall, out, lse, splits, place.");
  m.def("rotary", &rotary, "Rotate q and k: RotaryCall, outputs, place.");
}
