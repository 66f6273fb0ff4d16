// Where a call runs.
#pragma once

namespace longrope_cuda {

struct Place {
  int device;
  void* stream;  // a cudaStream_t
};

}  // namespace longrope_cuda
