// How the volume's kernels divide the logits between threads, and read them.
#pragma once

#include "group.h"
#include "volume.h"

namespace multilora {

// The neighbouring classes that a thread takes at once: 16 bytes of float32 or float64.
template <class T>
constexpr int kClasses = sizeof(accumulator_t<T>) == 8 ? 2 : 4;

// The numbers of some classes, which volume.h handles as one value.
template <class A, int M>
struct Pack {
  A v[M];

  Pack() = default;
  MULTILORA_HD explicit Pack(A x) {
    MULTILORA_UNROLL
    for (int m = 0; m < M; ++m) v[m] = x;
  }
};

template <class A, int M>
MULTILORA_HD Pack<A, M> operator+(Pack<A, M> a, Pack<A, M> b) {
  MULTILORA_UNROLL
  for (int m = 0; m < M; ++m) a.v[m] += b.v[m];
  return a;
}

template <class A, int M>
MULTILORA_HD Pack<A, M> operator*(Pack<A, M> a, Pack<A, M> b) {
  MULTILORA_UNROLL
  for (int m = 0; m < M; ++m) a.v[m] *= b.v[m];
  return a;
}

// Loads M classes from `first` on, with −∞ from `end` on. `aligned` means that rows, and parts of
// them, start at multiples of M.
template <int M, class T>
__device__ inline void load_classes(const T* row, int64_t first, int64_t end, bool aligned,
                                    accumulator_t<T>* z) {
  struct alignas(sizeof(T) * M) Together {
    T v[M];
  };
  if (aligned && first + M <= end) {
    Together all = *reinterpret_cast<const Together*>(row + first);
    MULTILORA_UNROLL
    for (int m = 0; m < M; ++m) z[m] = load(all.v[m]);
  } else {
    MULTILORA_UNROLL
    for (int m = 0; m < M; ++m) {
      z[m] = first + m < end ? load(row[first + m]) : accumulator_t<T>(-INFINITY);
    }
  }
}

template <int M, class T>
__device__ inline void store_classes(T* row, int64_t first, int64_t end, bool aligned,
                                     const accumulator_t<T>* z) {
  struct alignas(sizeof(T) * M) Together {
    T v[M];
  };
  if (aligned && first + M <= end) {
    Together all;
    MULTILORA_UNROLL
    for (int m = 0; m < M; ++m) store(&all.v[m], z[m]);
    *reinterpret_cast<Together*>(row + first) = all;
  } else {
    MULTILORA_UNROLL
    for (int m = 0; m < M; ++m) {
      if (first + m < end) store(row + first + m, z[m]);
    }
  }
}

// The part of the classes that blockIdx.y takes, in whole steps of `step` classes.
__device__ inline void own_classes(int64_t C, int64_t step, int splits, int64_t& begin,
                                   int64_t& end) {
  int64_t each = ((C + step - 1) / step + splits - 1) / splits * step;
  begin = each * blockIdx.y;
  end = begin + each < C ? begin + each : C;
}

// Whether an example takes part. fail() does not return, so the compiler need not keep registers
// live across it.
__device__ inline bool takes_part(int64_t target, int64_t C) {
  if (target >= 0 && target < C) return true;
  if (target != kIgnored) fail("a target is outside [0, C)");
  return false;
}

// Calls the function with a number of the type that `dtype` names.
template <class Function>
void with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f32: return function(float());
    case DType::f64: return function(double());
    case DType::f16: return function(f16());
    case DType::bf16: return function(bf16());
    case DType::i64: return;  // no logits
  }
}

inline int power_of_two(int64_t x) {
  int power = 1;
  while (power < x) power *= 2;
  return power;
}

// Whether pieces of `each` classes start at multiples of their size.
template <class T>
bool is_aligned(const void* pointer, int64_t each, int64_t stride_k, int64_t stride_n) {
  return reinterpret_cast<uintptr_t>(pointer) % (each * int64_t(sizeof(T))) == 0 &&
         stride_k % each == 0 && stride_n % each == 0;
}

}  // namespace multilora
