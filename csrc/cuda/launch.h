// How kernels are launched: the only place that does it, so that what is launched under nvcc also
// runs on the CPU, in the emulator of tests/cpp/emulator (LONGROPE_EMULATE).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#if defined(LONGROPE_EMULATE)
// Brings dim3, threadIdx and its kin, __global__ and the other words of CUDA, and
//   void longrope_emulator::launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
//                                  const std::function<void()>& thread);
// which runs `thread` as every thread of every block, with shared_bytes of dynamic shared memory.
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace longrope_cuda {

inline std::string text_of(dim3 size) {
  return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " +
         std::to_string(size.z) + ")";
}

[[noreturn]] inline void launch_failed(const char* name, dim3 grid, dim3 block,
                                       std::size_t shared_bytes, const std::string& why) {
  throw std::runtime_error("launch of " + std::string(name) + " failed: grid " + text_of(grid) +
                           ", block " + text_of(block) + ", " + std::to_string(shared_bytes) +
                           " bytes of dynamic shared memory: " + why);
}

#if !defined(LONGROPE_EMULATE)

// Throws for a CUDA call that failed; `call` says which.
inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
}

#endif

// Makes the caller's device that of this thread for what is launched next. The caller has made it
// current for the runtime it knows; the one linked here usually sees that already.
inline void use_device(int device) {
#if !defined(LONGROPE_EMULATE)
  int current = -1;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current != device) check(cudaSetDevice(device), "cudaSetDevice");
#else
  (void)device;
#endif
}

// What every kernel can count on without asking for more.
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;

// Launches kernel(arguments...) on a stream (a cudaStream_t; null is the default stream). Raises
// std::runtime_error with the kernel's name and parameters where it does not start.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const char* name, dim3 grid, dim3 block,
            std::size_t shared_bytes, void* stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter");
  std::tuple<std::decay_t<Parameters>...> values(arguments...);
#if defined(LONGROPE_EMULATE)
  (void)stream;
  longrope_emulator::launch(name, grid, block, shared_bytes,
                            [&] { std::apply(kernel, values); });
#else
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      (void)cudaGetLastError();
      launch_failed(name, grid, block, shared_bytes, cudaGetErrorString(error));
    }
  }
  const cudaError_t error = std::apply(
      [&](auto&... value) {
        void* addresses[] = {static_cast<void*>(&value)...};
        return cudaLaunchKernel(function, grid, block, addresses, shared_bytes,
                                static_cast<cudaStream_t>(stream));
      },
      values);
  // The error is also the runtime's last one: taken back here, it is reported once.
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    launch_failed(name, grid, block, shared_bytes, cudaGetErrorString(error));
  }
#endif
}

}  // namespace longrope_cuda
