// Whether tensors lie apart in memory, where one look says so; longrope_kernels/calls/memory.py has
// the whole answer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensors.h"

namespace longrope_calls {

struct Span {
  uint64_t begin;
  uint64_t end;

  bool meets(const Span& other) const { return begin < other.end && other.begin < end; }
};

// Of a tensor, whose elements follow one another in the order of its dimensions if it is written;
// else false.
inline bool span_of(PyObject* x, bool written, Span& to) {
  Tensor t;
  if (!is_tensor(x)) return false;
  if (lender->read(x, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  int64_t elements = 1, extent = 1;
  for (int32_t i = t.dims - 1; i >= 0; --i) {
    if (written && t.shape[i] != 1 && t.strides[i] != elements) return false;
    elements *= t.shape[i];
    extent += t.strides[i] * (t.shape[i] - 1);
  }
  if (elements == 0) extent = 0;
  to.begin = reinterpret_cast<uint64_t>(t.data());
  to.end = to.begin + static_cast<uint64_t>(extent) * t.bits * t.lanes / 8;
  return true;
}

// What is written from one another, and from what is read. False where a longer look must tell.
inline bool clearly_apart(const pybind11::tuple& written, const pybind11::tuple& read) {
  std::vector<Span> spans;
  const auto apart = [&spans](PyObject* x, bool is_written) {
    Span span;
    if (!span_of(x, is_written, span)) return false;
    for (const Span& other : spans) {
      if (span.meets(other)) return false;
    }
    if (is_written) spans.push_back(span);
    return true;
  };
  for (const auto& x : written) {
    if (!apart(x.ptr(), true)) return false;
  }
  for (const auto& x : read) {
    if (!apart(x.ptr(), false)) return false;
  }
  return true;
}

}  // namespace longrope_calls
