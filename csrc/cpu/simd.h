// Vectors of the level that is being compiled, in GCC's vector extensions, so that all levels and
// architectures share one source. Intrinsics are used only where one instruction replaces many.
#pragma once

#if defined(__AVX512F__) || defined(__AVX2__)
// Intrinsics with a mask are used throughout, because GCC warns about its own code in the others.
#include <immintrin.h>
#endif

#include "../common.h"
#include "levels.h"

namespace multilora::MULTILORA_LEVEL {

// The compiler's vectors. A comparison gives integers whose bits are all ones or all zeros.
template <class T>
struct NativeOf;
template <>
struct NativeOf<float> {
  using Int = int32_t;
  typedef float Native __attribute__((vector_size(MULTILORA_VECTOR_BYTES)));
  typedef Int Mask __attribute__((vector_size(MULTILORA_VECTOR_BYTES)));
};
template <>
struct NativeOf<double> {
  using Int = int64_t;
  typedef double Native __attribute__((vector_size(MULTILORA_VECTOR_BYTES)));
  typedef Int Mask __attribute__((vector_size(MULTILORA_VECTOR_BYTES)));
};

template <class T>
struct Vec {
  using Int = typename NativeOf<T>::Int;
  using Native = typename NativeOf<T>::Native;
  using Mask = typename NativeOf<T>::Mask;
  static constexpr int lanes = MULTILORA_VECTOR_BYTES / sizeof(T);

  Native v;

  Vec() = default;
  MULTILORA_HD Vec(Native x) : v(x) {}
  // x − 0 is x, also where x is −0.
  MULTILORA_HD explicit Vec(T x) : v(x - Native{}) {}

  MULTILORA_HD T operator[](int lane) const { return v[lane]; }
  MULTILORA_HD Vec& operator+=(Vec x) { return v += x.v, *this; }
  MULTILORA_HD Vec& operator*=(Vec x) { return v *= x.v, *this; }
};

template <class T>
MULTILORA_HD Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.v + b.v;
}
template <class T>
MULTILORA_HD Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.v - b.v;
}
template <class T>
MULTILORA_HD Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.v * b.v;
}
template <class T>
MULTILORA_HD Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.v / b.v;
}
template <class T>
MULTILORA_HD Vec<T> operator-(Vec<T> a) {
  return -a.v;
}
template <class T>
MULTILORA_HD typename Vec<T>::Mask operator<(Vec<T> a, Vec<T> b) {
  return a.v < b.v;
}
template <class T>
MULTILORA_HD typename Vec<T>::Mask operator==(Vec<T> a, Vec<T> b) {
  return a.v == b.v;
}

template <class T>
MULTILORA_HD Vec<T> where(typename Vec<T>::Mask mask, Vec<T> a, Vec<T> b) {
  return mask ? a.v : b.v;
}

// Returns a where b is NaN.
template <class T>
MULTILORA_HD Vec<T> max(Vec<T> a, Vec<T> b) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_maskz_max_ps(-1, b.v, a.v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_max_pd(-1, b.v, a.v);
#else
  return where<T>(a < b, b, a);
#endif
}

// Returns NaN where x is NaN.
template <class T>
MULTILORA_HD Vec<T> clamp(Vec<T> x, T low, T high) {
#ifdef __AVX512F__
  Vec<T> raised = max(x, Vec<T>(low));
  if constexpr (sizeof(T) == 4) return _mm512_maskz_min_ps(-1, Vec<T>(high).v, raised.v);
  if constexpr (sizeof(T) == 8) return _mm512_maskz_min_pd(-1, Vec<T>(high).v, raised.v);
#else
  x = where<T>(x < Vec<T>(low), Vec<T>(low), x);
  return where<T>(Vec<T>(high) < x, Vec<T>(high), x);
#endif
}

template <class T>
MULTILORA_HD Vec<T> sqrt(Vec<T> x) {
  for (int lane = 0; lane < Vec<T>::lanes; ++lane) x.v[lane] = __builtin_sqrt(x.v[lane]);
  return x;
}

// The lanes' numbers: 0, 1, ...
template <class T>
MULTILORA_HD typename Vec<T>::Mask lane_numbers() {
  typename Vec<T>::Mask numbers;
  for (int lane = 0; lane < Vec<T>::lanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// x with lane l exchanged for lane l ^ step. Reductions over the lanes combine x[l] and x[l +
// step], so their order depends on the number of lanes only.
template <int step, class T>
MULTILORA_HD Vec<T> turned(Vec<T> x) {
  return __builtin_shuffle(x.v, lane_numbers<T>() ^ step);
}

template <class T, int step = Vec<T>::lanes / 2>
MULTILORA_HD T sum(Vec<T> x) {
  if constexpr (step == 0) {
    return x[0];
  } else {
    return sum<T, step / 2>(x + turned<step>(x));
  }
}

template <class T, int step = Vec<T>::lanes / 2>
MULTILORA_HD T highest(Vec<T> x) {
  if constexpr (step == 0) {
    return x[0];
  } else {
    return highest<T, step / 2>(max(x, turned<step>(x)));
  }
}

// --- memory --------------------------------------------------------------------------------------

// As many 16-bit numbers as a vector holds floats.
typedef uint16_t Halves __attribute__((vector_size(MULTILORA_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(MULTILORA_VECTOR_BYTES)));

MULTILORA_HD Vec<float> widen(Halves x, bf16) {
  return bits_as<Vec<float>>(__builtin_convertvector(x, Words) << 16);
}

MULTILORA_HD Vec<float> widen(Halves x, f16) {
#ifdef __AVX512F__
  return _mm512_maskz_cvtph_ps(-1, bits_as<__m256i>(x));
#else
  // load(f16) in common.h explains this.
  Words bits = __builtin_convertvector(x, Words);
  Vec<float> magnitude = bits_as<Vec<float>>((bits & 0x7fff) << 13) * Vec<float>(0x1p112f);
  Words special = (bits & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000u : Words{};
  return bits_as<Vec<float>>(bits_as<Words>(magnitude) | special | (bits & 0x8000) << 16);
#endif
}

// store() in common.h explains these two.
MULTILORA_HD Halves narrow(Vec<float> x, bf16) {
  Words bits = bits_as<Words>(x);
  Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? Words{} + 0x7fff : rounded,
                                 Halves);
}

MULTILORA_HD Halves narrow(Vec<float> x, f16) {
#ifdef __AVX512F__
  return bits_as<Halves>(_mm512_maskz_cvtps_ph(-1, x.v, _MM_FROUND_TO_NEAREST_INT));
#else
  Words bits = bits_as<Words>(x), size = bits & 0x7fffffff;
  Words normal = (size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13;
  Words small = bits_as<Words>(bits_as<Vec<float>>(size) + Vec<float>(0.5f)) - 0x3f000000u;
  Words result = size < 0x38800000u ? small : normal;
  result = size >= 0x477ff000u ? Words{} + 0x7c00 : result;
  result = size > 0x7f800000u ? Words{} + 0x7e00 : result;
  return __builtin_convertvector(result | (bits >> 16 & 0x8000), Halves);
#endif
}

template <class V, class T>
MULTILORA_HD V load_bytes(const T* place) {
  V x;
  memcpy(&x, place, sizeof(x));
  return x;
}

// Reads `count` numbers and fills up with zeros, without touching the memory behind them.
template <class V, class T>
MULTILORA_HD V load_bytes(const T* place, int count) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 2) {
    return bits_as<V>(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), place));
  } else if constexpr (sizeof(T) == 4) {
    return bits_as<V>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), place));
  } else {
    return bits_as<V>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), place));
  }
#else
  V x{};
  memcpy(&x, place, count * sizeof(T));
  return x;
#endif
}

template <class V, class T>
MULTILORA_HD void store_bytes(T* place, V x, int count) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 2) {
    _mm256_mask_storeu_epi16(place, __mmask16((1u << count) - 1), bits_as<__m256i>(x));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(place, __mmask16((1u << count) - 1), bits_as<__m512>(x));
  } else {
    _mm512_mask_storeu_pd(place, __mmask8((1u << count) - 1), bits_as<__m512d>(x));
  }
#else
  memcpy(place, &x, count * sizeof(T));
#endif
}

template <class T>
using VecOf = Vec<accumulator_t<T>>;

template <class T>
MULTILORA_HD VecOf<T> load_vector(const T* place) {
  if constexpr (sizeof(T) == 2) {
    return widen(load_bytes<Halves>(place), T{});
  } else {
    return load_bytes<VecOf<T>>(place);
  }
}

template <class T>
MULTILORA_HD VecOf<T> load_vector(const T* place, int count) {
  if constexpr (sizeof(T) == 2) {
    return widen(load_bytes<Halves>(place, count), T{});
  } else {
    return load_bytes<VecOf<T>>(place, count);
  }
}

template <class T>
MULTILORA_HD void store_vector(T* place, VecOf<T> x) {
  if constexpr (sizeof(T) == 2) {
    Halves halves = narrow(x, T{});
    memcpy(place, &halves, sizeof(halves));
  } else {
    memcpy(place, &x, sizeof(x));
  }
}

template <class T>
MULTILORA_HD void store_vector(T* place, VecOf<T> x, int count) {
  if constexpr (sizeof(T) == 2) {
    store_bytes(place, narrow(x, T{}), count);
  } else {
    store_bytes(place, x, count);
  }
}

// Stores a whole, aligned vector past the caches, without reading the old contents. Other threads
// see it after finish_streaming().
template <class T>
MULTILORA_HD void stream_vector(T* place, Vec<T> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(place), bits_as<__m512i>(x));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(place), bits_as<__m256i>(x));
#else
  memcpy(place, &x, sizeof(x));
#endif
}

MULTILORA_HD void finish_streaming() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// --- functions -----------------------------------------------------------------------------------

template <class T>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr int mantissa = 23, bias = 127;
  // Adding this number rounds to an integer, which is then in the last bits.
  static constexpr float round = 0x1.8p23f;
  // exp is 0 below `low` and infinite above `high`.
  static constexpr float low = -105, high = 89;
  // log 2 is split in two so that n times the first part is exact.
  static constexpr float log2_high = 0x1.63p-1f, log2_low = -0x1.bd0106p-13f;
};
template <>
struct Exponent<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double round = 0x1.8p52;
  static constexpr double low = -746, high = 710;
  static constexpr double log2_high = 0x1.62e42feep-1, log2_low = 0x1.a39ef35793c76p-33;
};

// y·2ⁿ for integers n, rounded only once also where the result is subnormal.
template <class T>
MULTILORA_HD Vec<T> scaled(Vec<T> y, Vec<T> shifted, Vec<T> n) {
#ifdef __AVX512F__
  (void)shifted;
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_scalef_ps(-1, y.v, n.v);
  } else {
    return _mm512_maskz_scalef_pd(-1, y.v, n.v);
  }
#else
  // Scale in two halves, because 2ⁿ itself may be out of range.
  (void)n;
  using E = Exponent<T>;
  using Mask = typename Vec<T>::Mask;
  Mask k = bits_as<Mask>(shifted) - bits_as<typename Vec<T>::Int>(E::round);
  Mask half = k >> 1;
  Vec<T> first = bits_as<Vec<T>>((half + E::bias) << E::mantissa);
  return y * first * bits_as<Vec<T>>((k - half + E::bias) << E::mantissa);
#endif
}

// The error is below 1.5 units in the last place; −∞ gives 0 and NaN gives NaN.
template <class T>
MULTILORA_HD Vec<T> exp(Vec<T> x) {
  using V = Vec<T>;
  using E = Exponent<T>;
  x = clamp(x, E::low, E::high);
  V shifted = x * V(T(1.4426950408889634)) + V(E::round);
  V n = shifted - V(E::round);
  V r = x - n * V(E::log2_high);
  r = r - n * V(E::log2_low);
  // eʳ = 1 + r + r² q(r) for |r| <= log(2)/2; q to 1.1e-8 for float and 1.8e-17 for double.
  V q;
  if constexpr (sizeof(T) == 4) {
    q = V(0.00139262508f);
    q = q * r + V(0.00836323288f);
    q = q * r + V(0.0416665542f);
    q = q * r + V(0.166665766f);
  } else {
    q = V(2.5100472505694996e-8);
    q = q * r + V(2.7620201591031549e-7);
    q = q * r + V(2.7557268276905697e-6);
    q = q * r + V(2.4801521057868205e-5);
    q = q * r + V(1.9841269863171556e-4);
    q = q * r + V(1.3888888917367081e-3);
    q = q * r + V(8.3333333333300382e-3);
    q = q * r + V(4.1666666666623821e-2);
    q = q * r + V(0.16666666666666667);
  }
  q = q * r + V(T(0.5));
  return scaled(V(T(1)) + (r + r * r * q), shifted, n);
}

MULTILORA_HD Vec<double> log(Vec<double> x) {
  using V = Vec<double>;
  using Mask = V::Mask;
  constexpr int64_t root = 0x3fe6a09e667f3bcd;
  // Scale subnormal numbers into the normal range.
  Mask tiny = x < V(0x1p-1022);
  V y = where<double>(tiny, x * V(0x1p54), x);
  // y = m 2ᵏ with m between √½ and √2.
  Mask bits = bits_as<Mask>(y);
  Mask k = (bits - root) >> 52;
  V m = bits_as<V>(bits - (k << 52));
  V exponent = bits_as<V>(k + bits_as<int64_t>(0x1.8p52)) - V(0x1.8p52);
  exponent = exponent - where<double>(tiny, V(54.0), V(0.0));
  // log m = 2 artanh s = 2s + s z R(z), z = s², R to 1e-17.
  V s = (m - V(1.0)) / (m + V(1.0)), z = s * s;
  V r(0.1461780715341732);
  r = r * z + V(0.15331611732055008);
  r = r * z + V(0.18182892432536871);
  r = r * z + V(0.22222211089379496);
  r = r * z + V(0.28571428626253838);
  r = r * z + V(0.3999999999989889);
  r = r * z + V(0.66666666666666697);
  V low = s * z * r + exponent * V(Exponent<double>::log2_low);
  V result = exponent * V(Exponent<double>::log2_high) + (s + s + low);
  constexpr double infinity = __builtin_inf();
  result = where<double>(x == V(infinity), x, result);
  result = where<double>(x == V(0.0), V(-infinity), result);
  // NaN and negative numbers give NaN.
  return where<double>(V(-1e-320) < x, result, V(__builtin_nan("")));
}

}  // namespace multilora::MULTILORA_LEVEL
