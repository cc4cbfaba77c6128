// CUDA on the CPU, for the tests: one block after another, every thread of a block a fiber.
//
// A fiber runs until it waits (for a barrier, a shuffle, a copy), then the next one does. Shared memory
// starts as NaN, and a block in which everything waits for ever is an error. What is not emulated is the
// memory model: fibers see each other's writes at once, so a missing fence goes unnoticed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "stream.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace multilora {
namespace emulate {

// Let the other threads of the block run; for loops that wait for what they do.
void yield();
// Something happened that a waiting thread may be waiting for.
void progressed();
// Wait until `count` threads have called this with the same key.
void barrier(uint64_t key, int count);
// Every thread named by `mask` of this warp gives a value and gets that of the thread `source`.
void exchange(unsigned mask, void* value, size_t size, int source);

void run(const std::function<void()>& thread, dim3 grid, dim3 block, size_t shared_bytes);
unsigned char* dynamic_shared();
// Poisons an array the first time that a thread of the block comes by.
void fresh(void* array, size_t size);

inline int linear_thread() {
  return int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}
inline int lane() { return linear_thread() % 32; }
inline int warp() { return linear_thread() / 32; }

}  // namespace emulate

[[noreturn]] inline void fail(const char* message) {
  throw std::runtime_error(std::string("multilora: ") + message);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  bool fits = block.x * block.y * block.z <= 1024 && grid.x <= INT32_MAX && grid.y <= 65535 &&
              grid.z <= 65535 && shared_bytes <= 227 * 1024 && (sizeof(Parameters) + ... + 0) <= 4096;
  if (!fits) throw std::runtime_error("emulation: a launch that no GPU takes");
  emulate::run([&] { kernel(Parameters(arguments)...); }, grid, block, shared_bytes);
}

}  // namespace multilora

#define MULTILORA_SHARED(type, name, count) \
  alignas(16) static type name[count];      \
  multilora::emulate::fresh(name, sizeof(name))
#define MULTILORA_DYNAMIC_SHARED(name) unsigned char* name = multilora::emulate::dynamic_shared()

inline void __syncthreads() {
  multilora::emulate::barrier(0, int(blockDim.x * blockDim.y * blockDim.z));
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  char nothing = 0;
  multilora::emulate::exchange(mask, &nothing, 1, multilora::emulate::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  int lane = multilora::emulate::lane();
  multilora::emulate::exchange(mask, &x, sizeof(T), lane / width * width + source % width);
  return x;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  multilora::emulate::exchange(mask, &x, sizeof(T), multilora::emulate::lane() ^ lanes);
  return x;
}

template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  int lane = multilora::emulate::lane();
  // Past the end, a thread keeps its own value.
  int source = lane % width + int(by) < width ? lane + int(by) : lane;
  multilora::emulate::exchange(mask, &x, sizeof(T), source);
  return x;
}

template <class T>
T __ldg(const T* place) {
  return *place;
}
