// Records from the tuples that longrope_kernels/calls/addresses.py makes, for the bindings.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "records.h"

namespace longrope_calls {

inline void load(PyObject* from, int64_t& to) {
  to = PyLong_AsLongLong(from);
  if (to == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
}

inline void load(PyObject* from, int32_t& to) {
  int64_t wide;
  load(from, wide);
  to = static_cast<int32_t>(wide);
  if (to != wide) throw std::overflow_error("a size beyond 2**31");
}

inline void load(PyObject* from, double& to) {
  to = PyFloat_AsDouble(from);
  if (to == -1.0 && PyErr_Occurred()) throw pybind11::error_already_set();
}

inline void load(PyObject* from, bool& to) { to = from == Py_True; }

template <typename T>
void load(PyObject* from, T*& to) {
  int64_t address;
  load(from, address);
  to = reinterpret_cast<T*>(address);
}

inline void load(PyObject* from, ElementType& to) {
  int32_t number;
  load(from, number);
  to = static_cast<ElementType>(number);
}

// The first strides of a tuple, and 0 where it has fewer.
template <size_t kCount>
void load(PyObject* from, int64_t (&to)[kCount]) {
  const Py_ssize_t given = PyTuple_Check(from) ? PyTuple_GET_SIZE(from) : 0;
  for (size_t i = 0; i < kCount; ++i) {
    to[i] = 0;
    if (static_cast<Py_ssize_t>(i) < given) load(PyTuple_GET_ITEM(from, i), to[i]);
  }
}

// A tuple of exactly these.
template <typename... Fields>
void load_fields(PyObject* from, Fields&... to) {
  if (!PyTuple_Check(from) || PyTuple_GET_SIZE(from) != sizeof...(Fields)) {
    throw std::invalid_argument("a record with other fields");
  }
  Py_ssize_t i = 0;
  (load(PyTuple_GET_ITEM(from, i++), to), ...);
}

inline void load(PyObject* from, TokenRows& to) { load_fields(from, to.data, to.strides); }

inline void load(PyObject* from, Integers& to) {
  load_fields(from, to.data, to.strides, to.are_int64);
}

inline void load(PyObject* from, Scales& to) {
  int64_t strides[1];
  load_fields(from, to.data, strides);
  to.stride = strides[0];
}

inline void load(PyObject* from, Tables& to) {
  load_fields(from, to.steps, to.n_hat, to.attention_factor, to.max_length, to.interleaved,
              to.sets, to.pairs);
}

inline void load(PyObject* from, Selection& to) {
  load_fields(from, to.lengths, to.sets, to.borders, to.sequences);
}

inline void load(PyObject* from, Scores& to) {
  load_fields(from, to.causal, to.scale, to.window, to.cap);
}

inline void load(PyObject* from, Keys& to) {
  load_fields(from, to.k, to.v, to.positions, to.start, to.borders, to.lens, to.block_table,
              to.k_scale, to.v_scale, to.slots);
}

inline void load(PyObject* from, Heads& to) { load_fields(from, to.in, to.out, to.heads); }

inline void load(PyObject* from, RotaryCall& to) {
  int64_t shape[4];
  load_fields(from, to.type, shape, to.q, to.k, to.positions, to.tables, to.selection,
              to.conjugate);
  to.batch = shape[0];
  to.seq = shape[1];
  to.dim = shape[3];
}

// The shape of q: (batch, queries, heads, dim).
template <typename Call>
void load_shape(const int64_t (&shape)[4], Call& to) {
  int32_t* const sizes[] = {&to.batch, &to.queries, &to.heads, &to.dim};
  for (int i = 0; i < 4; ++i) {
    if (shape[i] > std::numeric_limits<int32_t>::max()) {
      throw std::overflow_error("a size beyond 2**31");
    }
    *sizes[i] = static_cast<int32_t>(shape[i]);
  }
}

inline void load(PyObject* from, AttentionCall& to) {
  int64_t shape[4];
  load_fields(from, to.type, shape, to.kv_heads, to.q, to.out, to.lse, to.lse_strides,
              to.positions, to.keys, to.tables, to.selection, to.scores);
  load_shape(shape, to);
}

inline void load(PyObject* from, AppendCall& to) {
  int64_t shape[4];
  load_fields(from, to.type, shape, to.cache_is_float8, to.k, to.v, to.cache, to.slot_mapping);
  to.batch = shape[0];
  to.tokens = shape[1];
  to.heads = shape[2];
  to.dim = shape[3];
}

inline void load(PyObject* from, DecodeCall& to) {
  int64_t shape[4];
  load_fields(from, to.type, shape, to.kv_heads, to.q, to.out, to.lse, to.caches_are_float8,
              to.keys, to.tables, to.selection, to.scores);
  load_shape(shape, to);
}

template <typename Record>
Record from_python(const pybind11::tuple& from) {
  Record record;
  load(from.ptr(), record);
  return record;
}

}  // namespace longrope_calls
