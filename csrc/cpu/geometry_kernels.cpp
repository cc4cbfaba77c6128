// Gram matrices of the factors, and products with them.
//
// The Gram matrices are in float64. Products of float32 factors are then exact, and so distances of
// nearly equal particles, which are small differences of large traces, come out right. The gradient
// of float32 factors is a float32 product of differences: with C_ij = U_ij G_ij in float64,
//     dA_i = Σ_j C_ij A_j = (Σ_j C_ij) A_i + Σ_j C_ij (A_j − A_i).
// The sum in brackets cancels in float64, and the difference of nearly equal numbers is exact, so
// each pair's force has float32's precision however close the two particles are. Compared with
// float64, only the rounding of a float32 sum over the pairs is lost. A particle that is much
// smaller than i is not taken as a difference: it would lose its digits next to A_i.
#include "geometry_kernels.h"

#include <utility>

#include "transpose.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

// A product's tile, rows by vectors: its sums take 24 of 32 registers, or 12 or 8 of 16.
constexpr int kRows = kLanes == 8 ? 8 : 4;
constexpr int kVectors = kLanes == 2 ? 2 : 3;

// body(place, vector's width) over a run of `count` numbers, in vectors that get shorter.
template <int LANES, class Body>
__attribute__((always_inline)) inline void along(int64_t count, Body body, int64_t place = 0) {
  for (; place + LANES <= count; place += LANES) {
    body(place, std::integral_constant<int, LANES>());
  }
  if constexpr (LANES > 1) along<LANES / 2>(count, body, place);
}

template <class To, class From>
void convert(To* to, const From* from, int64_t count) {
  constexpr int widest = sizeof(From) == 8 || sizeof(To) == 8 ? kLanes : lanes_of<float>;
  along<widest>(count, [=](int64_t at, auto lanes) __attribute__((always_inline)) {
    write<lanes()>(to + at, read<lanes()>(from + at));
  });
}

template <class To, class From>
void add_times(To* to, To factor, const From* from, int64_t count) {
  along<lanes_of<To>>(count, [=](int64_t at, auto lanes) __attribute__((always_inline)) {
    auto sum = read<lanes()>(to + at) + factor * read_as<lanes(), To>(from + at);
    write<lanes()>(to + at, sum);
  });
}

template <class To>
void convert_times(To* to, double factor, const double* from, int64_t count) {
  along<kLanes>(count, [=](int64_t at, auto lanes) __attribute__((always_inline)) {
    write<lanes()>(to + at, factor * read<lanes()>(from + at));
  });
}

// gram (kRows, VECTORS · kLanes) += leftᵀ right over `count` features, which are the rows of both.
template <int VECTORS>
void gram_tile(const double* left, const double* right, int64_t side, int64_t count, double* gram) {
  // The loops must be fully unrolled; otherwise the sums would go through memory.
  Vector<double> sums[kRows][VECTORS];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = Vector<double>{};
  }
  for (int64_t at = 0; at < count; ++at, left += side, right += side) {
    Vector<double> values[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) values[v] = read<kLanes>(right + v * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[row][v] += left[row] * values[v];
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      double* place = gram + row * side + v * kLanes;
      write<kLanes>(place, read<kLanes>(place) + sums[row][v]);
    }
  }
}

// The upper triangle of gram += panelᵀ panel, where the panel's rows are features.
void add_gram(const double* panel, int64_t side, int64_t count, double* gram) {
  for (int64_t row = 0; row < side; row += kRows) {
    for (int64_t col = row; col < side;) {
      int64_t vectors = (side - col) / kLanes;
      // Prefer two tiles of two vectors to tiles of three and one: a narrow tile waits for its
      // sums.
      int now = vectors >= kVectors && vectors != kVectors + 1 ? kVectors : vectors > 1 ? 2 : 1;
      auto tile = now == kVectors ? gram_tile<kVectors> : now == 2 ? gram_tile<2> : gram_tile<1>;
      tile(panel + row, panel + col, side, count, gram + row * side + col);
      col += now * kLanes;
    }
  }
}

// Copies contiguous rows (count, rank) to rows that are `step` apart; WIDTH divides rank.
template <int WIDTH, class T>
void scatter(double* to, int64_t step, const T* from, int64_t rank, int64_t count) {
  for (int64_t at = 0; at < count; ++at, to += step, from += rank) {
    for (int64_t a = 0; a < rank; a += WIDTH) write<WIDTH>(to + a, read<WIDTH>(from + a));
  }
}

// Writes `count` features of all particles, from `first` on, to panel (count, side) in float64.
template <class T>
void features_by_row(const Factor& factor, int particles, int64_t rank, int64_t first,
                     int64_t count, int64_t side, double* panel) {
  const T* x = static_cast<const T*>(factor.x);
  int64_t rows = particles * rank;
  if (factor.is_B) {
    auto put = rank % kLanes == 0 ? scatter<kLanes, T>
               : rank % 4 == 0    ? scatter<(kLanes < 4 ? kLanes : 4), T>
               : rank % 2 == 0    ? scatter<2, T>
                                  : scatter<1, T>;
    for (int i = 0; i < particles; ++i) {
      put(panel + i * rank, side, x + (i * factor.d + first) * rank, rank, count);
    }
  } else {
    transpose(panel, side, x + first, factor.d, rows, count);
  }
  for (int64_t at = 0; at < count && rows < side; ++at) {
    for (int64_t row = rows; row < side; ++row) panel[at * side + row] = 0;
  }
}

template <class T>
void gram_of(const Adapters& adapters, const Layer& layer, int which, int64_t first, int64_t last,
             double* gram, double* panel) {
  int64_t side = gram_side(adapters.particles, layer.rank), width = panel_features(side);
  memset(gram, 0, sizeof(double) * side * side);
  for (int64_t at = first; at < last; at += width) {
    int64_t count = last - at < width ? last - at : width;
    features_by_row<T>(layer.factors[which], adapters.particles, layer.rank, at, count, side,
                       panel);
    add_gram(panel, side, count, gram);
  }
}

void gather(double* parts, int64_t count, int64_t side) {
  int64_t size = side * side;
  for (int64_t part = 1; part < count; ++part) add_times(parts, 1.0, parts + part * size, size);
  for (int64_t done = kRows; done < side; done += kRows) {
    double* row = parts + (done - kRows) * side;
    transpose(parts + done * side + done - kRows, side, row + done, side, kRows, side - done);
  }
}

template <class Out>
void trace_of(const Adapters& adapters, const Layer& layer, const Gram& gram_A, const Gram& gram_B,
              double* norms) {
  int particles = adapters.particles;
  Out* out = static_cast<Out*>(layer.traces);
  double scale = layer.scaling * layer.scaling;
  for (int i = 0; i < particles; ++i) {
    norms[i] = trace(SingleThread(), gram_A, gram_B, layer.rank, i, i);
    out[i * particles + i] = adapters.distance ? Out(0) : Out(scale * norms[i]);
    for (int j = 0; j < i; ++j) {
      double value = trace(SingleThread(), gram_A, gram_B, layer.rank, j, i);
      if (adapters.distance) value = distance(norms[i], norms[j], value);
      out[i * particles + j] = out[j * particles + i] = Out(scale * value);
    }
  }
}

// Whether particle j's factor is taken as a difference from particle i's. norms: ‖A_i‖².
bool is_near(const double* norms, int i, int j) { return j != i && norms[j] > norms[i] / 4; }

// For every particle i, the matrix (K·r, r) by which its gradient is multiplied: the blocks C_ij,
// where C_ii is replaced by its sum with the blocks of the near particles.
template <class T>
void weigh_as(const Adapters& adapters, const Layer& layer, const Gram& gram, const Gram& own,
              T* weight, double* norms, double* sums) {
  int particles = adapters.particles;
  int64_t rank = layer.rank, block = rank * rank;
  for (int i = 0; i < particles; ++i) {
    norms[i] = 0;
    for (int64_t row = i * rank; row < (i + 1) * rank; ++row) norms[i] += own.at(row, row);
  }
  for (int i = 0; i < particles; ++i, weight += particles * block) {
    memset(sums, 0, sizeof(double) * block);
    for (int j = 0; j < particles; ++j) {
      double U = pull(layer.upstream, particles, layer.scaling, i, j);
      bool counts = j == i || is_near(norms, i, j);
      for (int64_t b = 0; b < rank; ++b) {
        const double* from = gram.parts + (j * rank + b) * gram.side + i * rank;
        convert_times(weight + j * block + b * rank, U, from, rank);
        if (counts) add_times(sums + b * rank, U, from, rank);
      }
    }
    convert(weight + i * block, sums, block);
  }
}

// Computes ROWS rows of particle i's gradient for VECTORS vectors of features. `weight` points to
// the first of these rows' columns in particle i's matrix.
template <class T, int ROWS, int VECTORS>
void apply_tile(const T* weight, const T* x, int64_t width, const double* norms, int particles,
                int64_t rank, int i, T* result) {
  constexpr int lanes = lanes_of<T>;
  Vector<T> sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[row][v] = Vector<T>{};
  }
  const T* own = x + i * rank * width;
  for (int j = 0; j < particles; ++j) {
    bool near = is_near(norms, i, j);
    for (int64_t b = 0; b < rank; ++b, weight += rank, x += width) {
      Vector<T> values[VECTORS];
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        values[v] = read<lanes>(x + v * lanes);
        if (near) values[v] -= read<lanes>(own + b * width + v * lanes);
      }
#pragma GCC unroll 8
      for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[row][v] += weight[row] * values[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      write<lanes>(result + row * width + v * lanes, sums[row][v]);
    }
  }
}

// Computes particle i's gradient (r, width), from `row` on, from all particles' x (K·r, width).
template <int ROWS = kRows, class T>
void apply_rows(const T* weight, const T* x, int64_t width, int64_t count, const double* norms,
                int particles, int64_t rank, int i, T* result, int64_t row = 0) {
  constexpr int lanes = lanes_of<T>;
  for (; row + ROWS <= rank; row += ROWS) {
    for (int64_t at = 0; at < count;) {
      int64_t vectors = ceil_div(count - at, lanes);
      int now = vectors >= kVectors ? kVectors : int(vectors);
      auto tile = now == kVectors ? apply_tile<T, ROWS, kVectors>
                  : now == 2      ? apply_tile<T, ROWS, 2>
                                  : apply_tile<T, ROWS, 1>;
      tile(weight + row, x + at, width, norms, particles, rank, i, result + row * width + at);
      at += now * lanes;
    }
  }
  if constexpr (ROWS > 1) {
    apply_rows<ROWS / 2>(weight, x, width, count, norms, particles, rank, i, result, row);
  }
}

// to += Σ_j mix_ij grad_j for `count` numbers; particle j's gradient starts at grad + j·step.
template <class T, class S>
void mix(const Adapters& adapters, const Layer& layer, int i, const S* grad, int64_t step, T* to,
         int64_t count) {
  int particles = adapters.particles;
  if (!adapters.mix_is_full) return add_times(to, T(layer.mix[i]), grad + i * step, count);
  for (int j = 0; j < particles; ++j) {
    add_times(to, T(layer.mix[i * particles + j]), grad + j * step, count);
  }
}

template <class S>
void apply_of(const Adapters& adapters, const Layer& layer, int which, int64_t first, int64_t last,
              const void* weights, const double* norms, double* scratch) {
  using T = accumulator_t<S>;
  const Factor& factor = layer.factors[which];
  int particles = adapters.particles;
  int64_t rank = layer.rank, rows = particles * rank, d = factor.d;
  int64_t width = panel_features(gram_side(particles, layer.rank));
  const S* x = static_cast<const S*>(factor.x);
  const S* grad = static_cast<const S*>(factor.grad);
  S* out = static_cast<S*>(factor.out);
  T* panel = reinterpret_cast<T*>(scratch);
  T *result = panel + rows * width, *turned = result + rank * width;
  for (int64_t at = first; at < last; at += width) {
    int64_t count = last - at < width ? last - at : width;
    for (int64_t row = 0; row < rows && !factor.is_B; ++row) {
      convert(panel + row * width, x + row * d + at, count);
    }
    for (int i = 0; i < particles && factor.is_B; ++i) {
      transpose(panel + i * rank * width, width, x + (i * d + at) * rank, rank, count, rank);
    }
    for (int i = 0; i < particles; ++i) {
      const T* weight = static_cast<const T*>(weights) + i * rows * rank;
      apply_rows(weight, panel, width, count, norms, particles, rank, i, result);
      // The runs that are contiguous in the factor: each row of lora_A, or all of lora_B.
      int64_t runs = factor.is_B ? 1 : rank, length = factor.is_B ? count * rank : count;
      T* values = factor.is_B ? turned : result;
      if (factor.is_B) transpose(turned, rank, result, width, rank, count);
      for (int64_t run = 0; run < runs; ++run, values += width) {
        int64_t place = factor.is_B ? at * rank : run * d + at;
        if (grad) mix(adapters, layer, i, grad + place, d * rank, values, length);
        convert(out + i * d * rank + place, values, length);
      }
    }
  }
}

void gram(const Adapters& adapters, const Layer& layer, int which, int64_t first, int64_t last,
          double* gram, double* scratch) {
  auto run = adapters.dtype == DType::f32   ? gram_of<float>
             : adapters.dtype == DType::f64 ? gram_of<double>
             : adapters.dtype == DType::f16 ? gram_of<f16>
                                            : gram_of<bf16>;
  run(adapters, layer, which, first, last, gram, scratch);
}

void traces(const Adapters& adapters, const Layer& layer, const Gram& gram_A, const Gram& gram_B,
            double* scratch) {
  auto run = adapters.dtype == DType::f64 ? trace_of<double> : trace_of<float>;
  run(adapters, layer, gram_A, gram_B, scratch);
}

void weigh(const Adapters& adapters, const Layer& layer, const Gram& gram, const Gram& own,
           void* weight, double* norms, double* scratch) {
  if (adapters.dtype == DType::f64) {
    weigh_as(adapters, layer, gram, own, static_cast<double*>(weight), norms, scratch);
  } else {
    weigh_as(adapters, layer, gram, own, static_cast<float*>(weight), norms, scratch);
  }
}

void apply(const Adapters& adapters, const Layer& layer, int which, int64_t first, int64_t last,
           const void* weight, const double* norms, double* scratch) {
  auto run = adapters.dtype == DType::f32   ? apply_of<float>
             : adapters.dtype == DType::f64 ? apply_of<double>
             : adapters.dtype == DType::f16 ? apply_of<f16>
                                            : apply_of<bf16>;
  run(adapters, layer, which, first, last, weight, norms, scratch);
}

}  // namespace

extern const GeometryKernels geometry_kernels;
const GeometryKernels geometry_kernels = {gram, gather, traces, weigh, apply};

}  // namespace multilora::MULTILORA_LEVEL
