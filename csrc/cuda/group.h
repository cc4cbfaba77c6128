// Neighbouring threads of a warp as a group; SingleThread in common.h explains groups.
#pragma once

#include "platform.h"

namespace multilora {

// `size` threads, a power of two up to 32, of a one-dimensional block. The order of a sum does not
// depend on the size of the block.
class Lanes {
 public:
  __device__ explicit Lanes(int size) : size_(size), rank_(int(threadIdx.x) & (size - 1)) {
    unsigned first = (threadIdx.x & 31) - unsigned(rank_);
    mask_ = (size == 32 ? 0xffffffffu : (1u << size) - 1) << first;
  }

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  template <class T>
  __device__ T sum(T x) const {
    for (int step = size_ / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask_, x, step);
    return x;
  }

  // No member's x may be NaN.
  template <class T>
  __device__ T max(T x) const {
    for (int step = size_ / 2; step > 0; step /= 2) {
      T other = __shfl_xor_sync(mask_, x, step);
      x = x < other ? other : x;
    }
    return x;
  }

  __device__ void sync() const { __syncwarp(mask_); }

 private:
  int size_, rank_;
  unsigned mask_;
};

}  // namespace multilora
