// Tensors as DLPack's C exchange API hands them out: torch lends it as a table of functions, so that
// an extension reads addresses, sizes and strides without libtorch, and serves any torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace longrope_calls {

// DLTensor of DLPack 1: what it points to is the tensor's own, and lives as long as that does as it
// is.
struct Tensor {
  void* start;
  int32_t device_type;
  int32_t device;
  int32_t dims;
  uint8_t kind;  // of the elements: ElementKind
  uint8_t bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;

  void* data() const { return static_cast<char*>(start) + byte_offset; }
  bool holds(uint8_t of_kind, int of_bits) const {
    return kind == of_kind && bits == of_bits && lanes == 1;
  }
};

enum ElementKind : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4, kFloat8E4M3Fn = 10 };

// DLPackExchangeAPI of DLPack 1.2 and later.
struct TensorLender {
  uint32_t major;
  uint32_t minor;
  const TensorLender* previous;  // of an earlier major version, or null
  void* unused[3];
  // 0, or another number with a Python exception set.
  int (*read)(void* object, Tensor* to);
};

inline const TensorLender* lender = nullptr;
inline PyTypeObject* tensor_type = nullptr;
inline PyTypeObject* parameter_type = nullptr;

// Before any tensor is read. Raises an ImportError where torch has no such table.
inline void find_lender() {
  namespace py = pybind11;
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  // They are never freed.
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_type = reinterpret_cast<PyTypeObject*>(torch.attr("nn").attr("Parameter").ptr());
  for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    const py::object found = py::getattr(tensor, name, py::none());
    void* address = nullptr;
    if (PyCapsule_CheckExact(found.ptr())) {
      address = PyCapsule_GetPointer(found.ptr(), PyCapsule_GetName(found.ptr()));
    } else if (PyLong_Check(found.ptr())) {  // before it became a capsule
      address = PyLong_AsVoidPtr(found.ptr());
    }
    lender = static_cast<const TensorLender*>(address);
    while (lender != nullptr && lender->major != 1) lender = lender->previous;
    if (lender != nullptr && lender->read != nullptr) return;
  }
  throw py::import_error("this torch has no C exchange API of DLPack 1, as torch 2.10 has");
}

// One of torch's own classes.
inline bool is_tensor(PyObject* x) {
  return Py_TYPE(x) == tensor_type || Py_TYPE(x) == parameter_type;
}

inline void load(PyObject* from, Tensor& to) {
  if (lender->read(from, &to) != 0) throw pybind11::error_already_set();
}

}  // namespace longrope_calls
