// Vectors of any number of lanes in GCC's extensions, and matrices that are turned in their
// registers.
#pragma once

#include <utility>

#include "../common.h"
#include "levels.h"

namespace multilora::MULTILORA_LEVEL {

// The numbers that a vector holds.
template <class T>
constexpr int lanes_of = MULTILORA_VECTOR_BYTES / sizeof(T);
constexpr int kLanes = lanes_of<double>;

template <class T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * LANES)));
};
template <class T, int LANES = lanes_of<T>>
using Vector = typename VectorOf<T, LANES>::type;

template <class T>
constexpr bool is_half = sizeof(T) == 2;

// Reads LANES numbers; half precision becomes float.
template <int LANES, class T>
Vector<accumulator_t<T>, LANES> read(const T* place) {
  Vector<accumulator_t<T>, LANES> v;
  if constexpr (is_half<T>) {
    for (int lane = 0; lane < LANES; ++lane) v[lane] = load(place[lane]);
  } else {
    memcpy(&v, place, sizeof(v));
  }
  return v;
}

template <int LANES, class To, class T>
Vector<To, LANES> read_as(const T* place) {
  return __builtin_convertvector(read<LANES>(place), Vector<To, LANES>);
}

template <int LANES, class T, class V>
void write(T* place, V v) {
  if constexpr (is_half<T>) {
    for (int lane = 0; lane < LANES; ++lane) store(place + lane, v[lane]);
  } else {
    auto converted = __builtin_convertvector(v, Vector<T, LANES>);
    memcpy(place, &converted, sizeof(converted));
  }
}

template <class V, int... LANE>
V select(V a, V b, std::integer_sequence<int, LANE...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, LANE...);
#else
  using Integer = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vector<Integer, sizeof...(LANE)>{LANE...});
#endif
}

// Exchanges the off-diagonal blocks of STEP lanes, then those of half as many.
template <int STEP, class V, int SIDE, int... LANE>
__attribute__((always_inline)) inline void exchange(V (&rows)[SIDE],
                                                    std::integer_sequence<int, LANE...> lanes) {
  if constexpr (STEP > 0) {
#pragma GCC unroll 8
    for (int row = 0; row < SIDE; ++row) {
      if (row & STEP) continue;
      V a = rows[row], b = rows[row + STEP];
      rows[row] =
          select(a, b, std::integer_sequence<int, (LANE & STEP ? LANE - STEP + SIDE : LANE)...>());
      rows[row + STEP] =
          select(a, b, std::integer_sequence<int, (LANE & STEP ? LANE + SIDE : LANE + STEP)...>());
    }
    exchange<STEP / 2>(rows, lanes);
  }
}

// to (cols, rows) = from (rows, cols) transposed, in blocks of SIDE; both are multiples of SIDE.
template <int SIDE, class To, class From>
void transpose_blocks(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t rows,
                      int64_t cols) {
  for (int64_t col = 0; col < cols; col += SIDE) {
    for (int64_t row = 0; row < rows; row += SIDE) {
      Vector<accumulator_t<From>, SIDE> block[SIDE];
#pragma GCC unroll 8
      for (int i = 0; i < SIDE; ++i) block[i] = read<SIDE>(from + (row + i) * from_step + col);
      exchange<SIDE / 2>(block, std::make_integer_sequence<int, SIDE>());
#pragma GCC unroll 8
      for (int i = 0; i < SIDE; ++i) write<SIDE>(to + (col + i) * to_step + row, block[i]);
    }
  }
}

// The same for sizes that are not multiples of SIDE.
template <int SIDE = kLanes, class To, class From>
void transpose(To* to, int64_t to_step, const From* from, int64_t from_step, int64_t rows,
               int64_t cols) {
  int64_t even_rows = rows / SIDE * SIDE, even_cols = cols / SIDE * SIDE;
  transpose_blocks<SIDE>(to, to_step, from, from_step, even_rows, even_cols);
  if constexpr (SIDE > 1) {
    // The rows below the finished blocks come first, then the columns to their right.
    transpose<SIDE / 2>(to + even_rows, to_step, from + even_rows * from_step, from_step,
                        rows - even_rows, cols);
    transpose<SIDE / 2>(to + even_cols * to_step, to_step, from + even_cols, from_step, even_rows,
                        cols - even_cols);
  }
}

}  // namespace multilora::MULTILORA_LEVEL
