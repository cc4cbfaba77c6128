// Everything that the kernels and their launches need from CUDA. Only launch() launches kernels.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <stdexcept>
#include <string>

#include "../common.h"
#include "stream.h"

// An array in the shared memory of the block.
#define MULTILORA_SHARED(type, name, count) __shared__ type name[count]
// The dynamic shared memory of a launch, aligned as the tensor memory accelerator requires.
#define MULTILORA_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

namespace multilora {

// Stops the kernel as a failed assert() does; the next synchronisation reports it.
__device__ inline void fail(const char* message) { __assert_fail(message, "multilora", 0, ""); }

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("multilora: ") + what +
                             " failed: " + cudaGetErrorString(status));
  }
}

// Makes a device the current one: the tensors of a call may be on another.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&before_), "finding the current GPU");
    device_ = device;
    if (device_ != before_) check(cudaSetDevice(device_), "choosing a GPU");
  }
  ~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);
  }

 private:
  int device_, before_;
};

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); an empty grid does nothing.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  CurrentDevice current(stream.device);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          "reserving shared memory");
  }
  kernel<<<grid, block, shared_bytes, reinterpret_cast<cudaStream_t>(stream.handle)>>>(
      Parameters(arguments)...);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace multilora
