// y = start + s·S·Bᵀ with S = X·Aᵀ, for some rows of one particle.
//
// Both products are as thin as the rank. S is made of dot products along the rows of x and of A; B
// is turned, some of its rows at a time, so that what is added to y is whole vectors too.
#include "low_rank_kernels.h"

#include "simd.h"
#include "transpose.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

// A product's tile: its sums take 16 of 32 registers, or 8 of 16.
constexpr int kRows = MULTILORA_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int kColumns = 4;
// So many of B's rows are turned at a time.
constexpr int64_t kPanel = 256;

// out (ROWS, COLUMNS) = x (ROWS, size) · a (COLUMNS, size)ᵀ
template <int ROWS, int COLUMNS, class T>
void dots(const T* x, int64_t x_step, const T* a, int64_t a_step, int64_t size, T* out,
          int64_t out_step) {
  // The loops must be fully unrolled; otherwise the sums would go through memory.
  Vec<T> sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int col = 0; col < COLUMNS; ++col) sums[row][col] = Vec<T>(T(0));
  }
  auto add = [&](auto read) __attribute__((always_inline)) {
    Vec<T> values[COLUMNS];
#pragma GCC unroll 8
    for (int col = 0; col < COLUMNS; ++col) values[col] = read(a + col * a_step);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      Vec<T> own = read(x + row * x_step);
#pragma GCC unroll 8
      for (int col = 0; col < COLUMNS; ++col) sums[row][col] += own * values[col];
    }
  };
  int64_t at = 0;
  for (; at + Vec<T>::lanes <= size; at += Vec<T>::lanes) {
    add([=](const T* place) __attribute__((always_inline)) { return load_vector(place + at); });
  }
  if (int rest = int(size - at)) {
    add([=](const T* place)
            __attribute__((always_inline)) { return load_vector(place + at, rest); });
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int col = 0; col < COLUMNS; ++col) out[row * out_step + col] = sum(sums[row][col]);
  }
}

// y (ROWS, VECTORS of columns) = start + s (ROWS, rank) · panel (rank, ...); the last vector has
// `count` columns. start: rows that are `start_step` apart, or null for zeros.
template <int ROWS, int VECTORS, class T>
void products(T* y, int64_t y_step, const T* start, int64_t start_step, const T* s, const T* panel,
              int64_t rank, int count) {
  constexpr int lanes = Vec<T>::lanes;
  Vec<T> sums[ROWS][VECTORS];
  bool whole = VECTORS > 1 || count == lanes;
  auto read = [=](const T* place) __attribute__((always_inline)) {
    return whole ? load_vector(place) : load_vector(place, count);
  };
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      sums[row][v] = start ? read(start + row * start_step + v * lanes) : Vec<T>(T(0));
    }
  }
  for (int64_t j = 0; j < rank; ++j, panel += kPanel) {
    Vec<T> values[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) values[v] = load_vector(panel + v * lanes);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; ++row) {
      Vec<T> own(s[row * rank + j]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += own * values[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      T* place = y + row * y_step + v * lanes;
      if (whole) {
        store_vector(place, sums[row][v]);
      } else {
        store_vector(place, sums[row][v], count);
      }
    }
  }
}

// body(place, number of them) over `count` rows or columns, in pieces of MOST and then of 1.
template <int MOST, class Body>
MULTILORA_HD void in_pieces(int64_t count, Body body) {
  int64_t at = 0;
  for (; at + MOST <= count; at += MOST) body(at, std::integral_constant<int, MOST>());
  for (; at < count; ++at) body(at, std::integral_constant<int, 1>());
}

int64_t scratch(int64_t rank) { return (kMostRows + kPanel) * rank * int64_t(sizeof(double)); }

template <class T>
void run(const LowRank& p, const Part& part, int64_t first, int64_t last, void* scratch) {
  constexpr int lanes = Vec<T>::lanes;
  int64_t rank = part.rank, count = last - first;
  const T* x = static_cast<const T*>(p.x) + first * p.stride_x;
  const T* A = static_cast<const T*>(p.lora_A) + part.particle * p.rank * p.d_in;
  const T* B = static_cast<const T*>(p.lora_B) + part.particle * p.rank * p.d_out;
  T* y = static_cast<T*>(p.y) + first * p.d_out;
  const T* start = p.start == p.y ? y : static_cast<const T*>(p.start);
  int64_t start_step = p.start == p.y ? p.d_out : 0;
  T *panel = static_cast<T*>(scratch), *S = panel + kPanel * rank;
  in_pieces<kColumns>(rank, [&](int64_t col, auto columns) {
    in_pieces<kRows>(count, [&](int64_t row, auto rows) {
      dots<rows(), columns()>(x + row * p.stride_x, p.stride_x, A + col * p.d_in, p.d_in, p.d_in,
                              S + row * rank + col, rank);
    });
  });
  if (p.shrunk) {
    T* kept = static_cast<T*>(p.shrunk) + first * p.rank;
    for (int64_t row = 0; row < count; ++row) {
      memcpy(kept + row * p.rank, S + row * rank, size_t(rank) * sizeof(T));
    }
  }
  for (int64_t i = 0; i < count * rank; ++i) S[i] *= T(part.scaling);
  for (int64_t begin = 0; begin < p.d_out; begin += kPanel) {
    int64_t width = p.d_out - begin < kPanel ? p.d_out - begin : kPanel;
    transpose(panel, kPanel, B + begin * p.rank, p.rank, width, rank);
    int64_t whole = width / lanes;
    int rest = int(width % lanes);
    in_pieces<kRows>(count, [&](int64_t row, auto rows) {
      auto tile = [&](int64_t vector, auto vectors, int used) {
        int64_t at = vector * lanes, col = begin + at;
        products<rows(), vectors()>(y + row * p.d_out + col, p.d_out,
                                    start ? start + row * start_step + col : nullptr, start_step,
                                    S + row * rank, panel + at, rank, used);
      };
      in_pieces<kColumns>(whole, [&](int64_t at, auto vectors) { tile(at, vectors, lanes); });
      if (rest) tile(whole, std::integral_constant<int, 1>(), rest);
    });
  }
}

}  // namespace

extern const LowRankKernels low_rank_kernels;
const LowRankKernels low_rank_kernels = {scratch, run<float>, run<double>};

}  // namespace multilora::MULTILORA_LEVEL
