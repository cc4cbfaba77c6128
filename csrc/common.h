// What every kernel shares, on the CPU and on the GPU: storage types, and groups of threads.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MULTILORA_HD __host__ __device__ __forceinline__
#elif defined(MULTILORA_LEVEL)
// Inlined whatever it costs: a copy of its own would be shared by the levels (cpu/levels.h).
#define MULTILORA_HD __attribute__((always_inline)) inline
#else
#define MULTILORA_HD inline
#endif

namespace multilora {

// As the Python side numbers them (multilora/ops/native.py).
enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, i64 = 4 };

template <class To, class From>
MULTILORA_HD To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 || dtype == DType::i64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// How many pieces of b cover a.
template <class A, class B>
MULTILORA_HD auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Half precision as it lies in memory. Arithmetic is done in float: load() and store().
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The type that values of T are computed in.
template <class T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};
template <class T>
using accumulator_t = typename accumulator<T>::type;

MULTILORA_HD float load(float x) { return x; }
MULTILORA_HD double load(double x) { return x; }

MULTILORA_HD float load(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

MULTILORA_HD float load(f16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // The exponent and mantissa in a float's place, scaled by what the biases differ in, 2^112:
  // exact, also for numbers below float16's normal range.
  float magnitude = bits_as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  // An infinity or NaN has all bits of the exponent set, and keeps them.
  uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits_as<float>(bits_as<uint32_t>(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
#endif
}

MULTILORA_HD void store(float* place, float x) { *place = x; }
MULTILORA_HD void store(double* place, double x) { *place = x; }
MULTILORA_HD void store(float* place, double x) { *place = float(x); }

MULTILORA_HD void store(bf16* place, float x) {
  // To the nearest, ties to even; the carry out of the mantissa is right too.
  uint32_t bits = bits_as<uint32_t>(x);
  bool nan = (bits & 0x7fffffff) > 0x7f800000;
  place->bits = nan ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

MULTILORA_HD void store(f16* place, float x) {
#ifdef __CUDA_ARCH__
  place->bits = __half_as_ushort(__float2half_rn(x));
#else
  uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) {
    place->bits = uint16_t(sign | 0x7e00);  // NaN
  } else if (size >= 0x477ff000) {
    place->bits = uint16_t(sign | 0x7c00);  // 65520 and more round to infinity
  } else if (size < 0x38800000) {
    // Below the normal range: adding 0.5 lines the mantissa up, and rounds it.
    float lined_up = bits_as<float>(size) + 0.5f;
    place->bits = uint16_t(sign | (bits_as<uint32_t>(lined_up) - 0x3f000000u));
  } else {
    uint32_t rounded = size - 0x38000000u + 0xfff + (size >> 13 & 1);
    place->bits = uint16_t(sign | rounded >> 13);
  }
#endif
}

MULTILORA_HD void store(bf16* place, double x) { store(place, float(x)); }
MULTILORA_HD void store(f16* place, double x) { store(place, float(x)); }

// A group of threads that work on one thing together. Every member calls every function in the same
// order, and takes the items rank(), rank() + size(), ... Results of sum and max reach all members.
// The maths in volume.h and geometry.h is written over such a group; this one has one member.
struct SingleThread {
  MULTILORA_HD int rank() const { return 0; }
  MULTILORA_HD int size() const { return 1; }
  template <class T>
  MULTILORA_HD T sum(T x) const {
    return x;
  }
  template <class T>
  MULTILORA_HD T max(T x) const {
    return x;
  }
  MULTILORA_HD void sync() const {}
};

}  // namespace multilora
