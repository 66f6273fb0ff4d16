// What of a call can be known without its values, as bytes: two calls of one kind differ in nothing
// but the numbers that their tensors hold and where these lie.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "tensors.h"

namespace longrope_calls {

// The bytes of arguments, one after another: a letter for what each is, then what it says of itself.
class Kind {
 public:
  // False where x is of no type that has a kind.
  bool add(PyObject* x) {
    if (x == Py_None) return letter('n');
    if (x == Py_True) return letter('t');
    if (x == Py_False) return letter('f');
    if (PyTuple_Check(x)) return add_tuple(x);
    if (is_tensor(x)) return add_tensor(x);
    if (PyLong_CheckExact(x)) return add_integer(x);
    if (PyFloat_CheckExact(x)) return add_float(PyFloat_AS_DOUBLE(x));
    return PyUnicode_CheckExact(x) && add_text(x);
  }

  const std::string& bytes() const { return bytes_; }

 private:
  bool letter(char what) {
    bytes_.push_back(what);
    return true;
  }

  // Seven bits a byte, lowest first; most sizes take one or two.
  void number(uint64_t n) {
    for (; n >= 128; n >>= 7) bytes_.push_back(static_cast<char>(n | 128));
    bytes_.push_back(static_cast<char>(n));
  }

  bool add_tuple(PyObject* x) {
    letter('(');
    number(PyTuple_GET_SIZE(x));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) {
      if (!add(PyTuple_GET_ITEM(x, i))) return false;
    }
    return true;
  }

  bool add_integer(PyObject* x) {
    int overflow;
    const int64_t n = PyLong_AsLongLongAndOverflow(x, &overflow);
    if (overflow) return false;
    letter(n < 0 ? '-' : '+');
    number(static_cast<uint64_t>(n));
    return true;
  }

  bool add_float(double x) {
    letter('.');
    char raw[sizeof x];
    std::memcpy(raw, &x, sizeof x);
    bytes_.append(raw, sizeof x);
    return true;
  }

  bool add_text(PyObject* x) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(x, &size);
    if (text == nullptr) return refused();
    letter('s');
    number(size);
    bytes_.append(text, size);
    return true;
  }

  // Whether it came before, and else its dtype, device, shape, strides and alignment.
  bool add_tensor(PyObject* x) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i] == x) {
        letter('=');
        number(i);
        return true;
      }
    }
    tensors_.push_back(x);
    Tensor t;
    if (lender->read(x, &t) != 0) return refused();  // such as one without memory
    letter('x');
    for (uint64_t n : {uint64_t{t.kind}, uint64_t{t.bits}, uint64_t{t.lanes},
                       static_cast<uint64_t>(t.device_type), static_cast<uint64_t>(t.device),
                       reinterpret_cast<uint64_t>(t.data()) % 16,
                       static_cast<uint64_t>(t.dims)}) {
      number(n);
    }
    for (int32_t i = 0; i < t.dims; ++i) {
      number(t.shape[i]);
      number(t.strides[i]);
    }
    return true;
  }

  static bool refused() {
    PyErr_Clear();
    return false;
  }

  std::string bytes_;
  std::vector<PyObject*> tensors_;
};

inline pybind11::object kind_of(pybind11::handle arguments) {
  Kind kind;
  if (!kind.add(arguments.ptr())) return pybind11::none();
  return pybind11::bytes(kind.bytes());
}

// The tensors of arguments, tuples in the order of their items.
inline void collect(PyObject* x, std::vector<PyObject*>& to) {
  if (is_tensor(x)) to.push_back(x);
  if (!PyTuple_Check(x)) return;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(x); ++i) collect(PyTuple_GET_ITEM(x, i), to);
}

inline pybind11::object fill(PyObject* form, const std::vector<PyObject*>& tensors) {
  namespace py = pybind11;
  if (PyBytes_CheckExact(form)) {
    const auto at = static_cast<uint8_t>(PyBytes_AS_STRING(form)[0]);
    return py::reinterpret_borrow<py::object>(tensors.at(at));
  }
  if (!PyTuple_CheckExact(form)) return py::reinterpret_borrow<py::object>(form);
  py::tuple result(PyTuple_GET_SIZE(form));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(form); ++i) {
    PyTuple_SET_ITEM(result.ptr(), i, fill(PyTuple_GET_ITEM(form, i), tensors).release().ptr());
  }
  return result;
}

// A form is a tuple, of tuples and others, in which a byte i stands for the tensor i of arguments.
inline pybind11::object filled(pybind11::handle form, pybind11::handle arguments) {
  std::vector<PyObject*> tensors;
  collect(arguments.ptr(), tensors);
  return fill(form.ptr(), tensors);
}

}  // namespace longrope_calls
