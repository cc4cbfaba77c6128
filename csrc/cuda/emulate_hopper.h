// hopper.h on the CPU, after the definitions in the PTX ISA, for the tests.
//
// Descriptors and swizzles are decoded bit by bit, so a wrong one gives wrong numbers. What is
// asynchronous happens as late as it may, and what it overwrites is NaN from the start: a copy into
// shared memory takes place when a thread waits for its barrier, a copy out of it and a product
// when its thread waits for it. Errors are raised where a rule of the hardware is broken: see
// emulate_hopper.cpp.
#pragma once

#include <type_traits>

#include "platform.h"

namespace multilora::hopper {

// What cuTensorMapEncodeTiled is told.
struct TensorMap {
  unsigned char* data;
  int64_t sizes[3], strides[3];  // in elements and in bytes
  uint32_t box[3];
};

TensorMap tensor_map(int device, DType dtype, const void* data, const int64_t (&sizes)[3],
                     const uint32_t (&box)[3]);

uint32_t shared_address(const void* place);

void barrier_init(uint64_t* barrier, uint32_t count);
inline void barrier_init_fence() {}
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void barrier_wait(uint64_t* barrier, uint32_t parity);

inline void prefetch(const TensorMap&) {}
void load_tile(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2);
void store_tile(const TensorMap& map, const void* from, int c0, int c1, int c2);
void store_wait_for(size_t left);
template <int LEFT>
void store_wait() {
  store_wait_for(LEFT);
}
void async_fence();

void store_matrices(void* row, const uint32_t (&fragments)[4]);

template <int COUNT>
void fewer_registers() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0);
}
template <int COUNT>
void more_registers() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0);
}

template <class T>
uint32_t pack(float first, float second) {
  T both[2];
  store(&both[0], first);
  store(&both[1], second);
  return both[0].bits | uint32_t(both[1].bits) << 16;
}

struct Product {
  uint64_t a, b;  // descriptors
  bool b_mn_major, accumulate;
  DType dtype;
  int cols;
  float* d;
};

void wgmma_fence();
void wgmma_issue(const Product& product);
void wgmma_commit();
void wgmma_wait_for(size_t left);
template <int COUNT>
void hold(float (&)[COUNT]) {}
template <int LEFT>
void wgmma_wait() {
  wgmma_wait_for(LEFT);
}

template <class T, bool B_MN_MAJOR, int HALF_N>
void wgmma(float (&d)[HALF_N], uint64_t a, uint64_t b, bool accumulate) {
  DType dtype = std::is_same_v<T, bf16> ? DType::bf16 : DType::f16;
  wgmma_issue({a, b, B_MN_MAJOR, accumulate, dtype, 2 * HALF_N, d});
}

}  // namespace multilora::hopper
