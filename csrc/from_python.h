// Records for the bindings, from those of longrope_kernels/calls/records.py, whose tensors are read
// here.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>

#include "records.h"
#include "tensors.h"

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

// A field that is read later.
inline void load(PyObject* from, PyObject*& to) { to = from; }

template <typename T>
void load(PyObject* from, T*& to) {
  int64_t address;
  load(from, address);
  to = reinterpret_cast<T*>(address);
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

inline ElementType type_of(const Tensor& x) {
  if (x.holds(kFloat, 32)) return ElementType::kFloat32;
  if (x.holds(kBFloat, 16)) return ElementType::kBFloat16;
  if (x.holds(kFloat, 16)) return ElementType::kFloat16;
  throw std::invalid_argument("a tensor of a dtype that no kernel is compiled for");
}

inline bool is_float8(const Tensor& x) { return x.holds(kFloat8E4M3Fn, 8); }

inline int32_t size_of(const Tensor& x, int axis) {
  if (x.shape[axis] > std::numeric_limits<int32_t>::max()) {
    throw std::overflow_error("a size beyond 2**31");
  }
  return static_cast<int32_t>(x.shape[axis]);
}

// The first strides of x, and 0 where it has fewer.
template <size_t kCount>
void copy_strides(const Tensor& x, int64_t (&to)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    to[i] = static_cast<int32_t>(i) < x.dims ? x.strides[i] : 0;
  }
}

inline TokenRows rows_of(const Tensor& x) {
  if (x.dims != 4) throw std::invalid_argument("a tensor without four dimensions");
  TokenRows rows;
  rows.data = x.data();
  copy_strides(x, rows.strides);
  return rows;
}

inline void load(PyObject* from, TokenRows& to) {
  Tensor x;
  load(from, x);
  to = rows_of(x);
}

inline void load(PyObject* from, Integers& to) {
  to = Integers{};
  if (from == Py_None) return;
  Tensor x;
  load(from, x);
  to.data = x.data();
  copy_strides(x, to.strides);
  to.are_int64 = x.holds(kInt, 64);
}

inline void load(PyObject* from, Scales& to) {
  to = Scales{};
  if (from == Py_None) return;
  Tensor x;
  load(from, x);
  to.data = static_cast<const float*>(x.data());
  to.stride = x.strides[0];
}

inline void load(PyObject* from, Tables& to) {
  Tensor steps, n_hat, attention_factor, max_length;
  PyObject* inv_freq;  // of the reference
  load_fields(from, steps, n_hat, attention_factor, max_length, inv_freq, to.interleaved);
  to.steps = static_cast<const uint64_t*>(steps.data());
  to.n_hat = static_cast<const int64_t*>(n_hat.data());
  to.attention_factor = static_cast<const double*>(attention_factor.data());
  to.max_length = static_cast<const int64_t*>(max_length.data());
  to.sets = steps.shape[0];
  to.pairs = steps.shape[2];
}

// Of a call with so many batch rows.
inline Selection selection_of(PyObject* from, int64_t batch) {
  Selection selection;
  PyObject* borders;
  load_fields(from, selection.lengths, selection.sets, borders);
  load(borders, selection.borders);
  selection.sequences = batch;
  if (borders != Py_None) {
    Tensor x;
    load(borders, x);
    selection.sequences = x.shape[0] - 1;
  }
  return selection;
}

inline void load(PyObject* from, Scores& to) {
  load_fields(from, to.causal, to.scale, to.window, to.cap);
}

// The keys, and k itself.
inline Tensor load_keys(PyObject* from, Keys& to) {
  Tensor k;
  load_fields(from, k, to.v, to.positions, to.start, to.borders, to.lens, to.block_table,
              to.k_scale, to.v_scale);
  to.k = rows_of(k);
  to.slots = size_of(k, 1);
  return k;
}

inline RotaryCall rotary_call(PyObject* from, PyObject* q_out, PyObject* k_out) {
  RotaryCall call;
  Tensor q, k;
  PyObject* selection;
  load_fields(from, q, k, call.positions, call.tables, selection, call.conjugate);
  call.type = type_of(q);
  call.batch = q.shape[0];
  call.seq = q.shape[1];
  call.dim = q.shape[3];
  call.q = {rows_of(q), {}, q.shape[2]};
  call.k = {rows_of(k), {}, k.shape[2]};
  load(q_out, call.q.out);
  load(k_out, call.k.out);
  call.selection = selection_of(selection, call.batch);
  return call;
}

// What calls that attend have alike: q, its output, and the keys.
template <typename Call>
Tensor load_attending(const Tensor& q, PyObject* keys, PyObject* selection, const Tensor& out,
                      const Tensor& lse, Call& to) {
  to.type = type_of(q);
  to.q = rows_of(q);
  to.out = rows_of(out);
  to.lse = static_cast<float*>(lse.data());
  to.batch = size_of(q, 0);
  to.queries = size_of(q, 1);
  to.heads = size_of(q, 2);
  to.dim = size_of(q, 3);
  to.selection = selection_of(selection, to.batch);
  const Tensor k = load_keys(keys, to.keys);
  to.kv_heads = size_of(k, 2);
  return k;
}

inline AttentionCall attention_call(PyObject* from, const Tensor& out, const Tensor& lse) {
  AttentionCall call;
  Tensor q;
  PyObject *keys, *selection, *sinks;  // no kernel here takes sinks
  load_fields(from, q, call.positions, keys, call.tables, selection, call.scores, sinks);
  load_attending(q, keys, selection, out, lse, call);
  copy_strides(lse, call.lse_strides);
  return call;
}

inline AppendCall append_call(PyObject* from) {
  AppendCall call;
  Tensor k;
  PyObject* cache;
  load_fields(from, k, call.v, cache, call.slot_mapping);
  call.type = type_of(k);
  call.k = rows_of(k);
  call.batch = k.shape[0];
  call.tokens = k.shape[1];
  call.heads = k.shape[2];
  call.dim = k.shape[3];
  call.cache_is_float8 = is_float8(load_keys(cache, call.cache));
  return call;
}

inline DecodeCall decode_call(PyObject* from, const Tensor& out, const Tensor& lse) {
  DecodeCall call;
  Tensor q;
  PyObject *keys, *selection;
  load_fields(from, q, keys, call.tables, selection, call.scores, call.sinks);
  call.caches_are_float8 = is_float8(load_attending(q, keys, selection, out, lse, call));
  return call;
}

// One argument of a binding.
template <typename T>
T from_python(const pybind11::handle& from) {
  T argument;
  load(from.ptr(), argument);
  return argument;
}

}  // namespace longrope_calls
