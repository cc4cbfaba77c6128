// The parts that all kernels share, on the CPU and on the GPU: storage types and groups of threads.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MULTILORA_HD __host__ __device__ __forceinline__
#elif defined(MULTILORA_LEVEL)
// These functions must be inlined: the linker would share a separate copy between the levels
// (cpu/levels.h).
#define MULTILORA_HD __attribute__((always_inline)) inline
#else
#define MULTILORA_HD inline
#endif

namespace multilora {

// multilora/ops/native.py uses the same numbers.
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

// The number of pieces of size b that cover a.
template <class A, class B>
MULTILORA_HD auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Half precision as it is stored. Arithmetic is done in float: see load() and store().
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// The type in which values of T are computed.
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
  // Move the exponent and the mantissa to a float's positions, then scale by the difference of the
  // biases, 2^112. This is exact, also for subnormal numbers.
  float magnitude = bits_as<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  // Infinities and NaNs have all exponent bits set; the float must have them set too.
  uint32_t special = (x.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits_as<float>(bits_as<uint32_t>(magnitude) | special | uint32_t(x.bits & 0x8000) << 16);
#endif
}

MULTILORA_HD void store(float* place, float x) { *place = x; }
MULTILORA_HD void store(double* place, double x) { *place = x; }
MULTILORA_HD void store(float* place, double x) { *place = float(x); }

MULTILORA_HD void store(bf16* place, float x) {
  // Round to nearest, ties to even. A carry out of the mantissa correctly raises the exponent.
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
    place->bits = uint16_t(sign | 0x7c00);  // 65520 and larger numbers round to infinity
  } else if (size < 0x38800000) {
    // The result is subnormal: adding 0.5 aligns the mantissa and rounds it.
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

// A group of threads that work on one item together: this one has a single member. All members call
// the same functions in the same order and take the items rank(), rank() + size(), ...; sum and max
// return their results to every member. volume.h and geometry.h are written for such groups.
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
