// gram_volume and particle_loss on the CPU, forward, for one level.
//
// While the classes are read, a vector holds classes of one particle and one example. Chunks of
// them stay in the first-level cache, and a chunk's sums are added up in float64. The rest is done
// with one example per lane. An example's results do not depend on its neighbours.
#include "volume_chunks.h"
#include "volume_kernels.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

using Double = Vec<double>;
constexpr int kExamples = Double::lanes;
// The other side of a tile of four particles: its sums take 16 of 32 registers, or 8 of 16.
constexpr int kOthers = kExamples == 8 ? 4 : 2;
constexpr double kInfinity = __builtin_inf();

template <class V>
Example<V> take_example(Scratch& scratch, int64_t K, int64_t side) {
  V *top = scratch.take<V>(K), *rest = scratch.take<V>(K), *norm = scratch.take<V>(K);
  V *own = scratch.take<V>(K), *matrix = scratch.take<V>(lower(side, 0));
  return {top, rest, norm, own, matrix, scratch.take<V>(side), scratch.take<V>(side)};
}

// Reads `count` logits into whole vectors `e`, with −∞ in the padding and on the target, which is
// outside [0, count) where the row does not contain it. Returns the largest logit.
template <class T, class V>
MULTILORA_HD accumulator_t<T> take_row(const T* logits, int64_t count, int64_t target, V* e) {
  using A = accumulator_t<T>;
  const V nothing(A(-kInfinity));
  const auto numbers = lane_numbers<A>();
  using Int = typename V::Int;
  int64_t at = target >= 0 && target < count ? target / V::lanes : -1;
  V top = nothing;
  int64_t full = count / V::lanes;
  for (int64_t m = 0; m < full; ++m) {
    V z = load_vector(logits + m * V::lanes);
    if (m == at) z = where<A>(numbers == Int(target - at * V::lanes), nothing, z);
    e[m] = z;
    top = max(top, z);
  }
  if (int rest = int(count - full * V::lanes)) {
    V z = load_vector(logits + full * V::lanes, rest);
    z = where<A>(numbers < Int(rest), z, nothing);
    if (full == at) z = where<A>(numbers == Int(target - at * V::lanes), nothing, z);
    e[full] = z;
    top = max(top, z);
  }
  return highest(top);
}

// Replaces e by exp(e − top) and returns its sum. Meanwhile it prefetches the numbers at `ahead`,
// which are read next, because nothing else uses the memory here.
template <class T, class A>
MULTILORA_HD A exponentials(Vec<A>* e, int64_t vectors, A top, const T* ahead) {
  Vec<A> base(top), total(A(0));
  for (int64_t m = 0; m < vectors; ++m) {
    __builtin_prefetch(ahead + m * Vec<A>::lanes);
    e[m] = exp(e[m] - base);
    total += e[m];
  }
  return sum(total);
}

// Reads as many numbers as a vector of float64 holds.
MULTILORA_HD Double load_double(const double* place) { return load_bytes<Double>(place); }
MULTILORA_HD Double load_double(const float* place) {
  typedef float Floats __attribute__((vector_size(MULTILORA_VECTOR_BYTES / 2)));
  return __builtin_convertvector(load_bytes<Floats>(place), Double::Native);
}

// ⟨e_i, e_j⟩ of `rows` particles i with `others` particles j, whose rows are `stride` apart. Where
// both are the same particles, only j <= i.
template <int rows, int others, bool same, class A>
MULTILORA_HD void products(const A* e, const A* next, int64_t stride, int64_t count,
                           double (&result)[rows][others]) {
  Double total[rows][others];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < others; ++q) total[r][q] = Double(0.0);
  }
#pragma GCC unroll 4
  for (int64_t c = 0; c < count; c += kExamples) {
    Double x[rows], y[others];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) x[r] = load_double(e + r * stride + c);
#pragma GCC unroll 8
    for (int q = 0; q < others; ++q) {
      if constexpr (same) {
        y[q] = x[q];
      } else {
        y[q] = load_double(next + q * stride + c);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q < (same ? r + 1 : others); ++q) total[r][q] += x[r] * y[q];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q < (same ? r + 1 : others); ++q) result[r][q] = sum(total[r][q]);
  }
}

// Adds the Gram matrix of e to the one so far, which `shrunk` (K) converts from the older maximum:
// ‖e‖² goes to `norm` and the rest to `matrix`, both in lane `lane`.
template <class A>
struct AddProducts {
  const Vec<A>* e;
  int64_t stride, count;
  const double* shrunk;
  Double *norm, *matrix;
  int lane;

  template <int rows, int others, bool same>
  void tile(int64_t i, int64_t j) const {
    const A* numbers = reinterpret_cast<const A*>(e);
    double result[rows][others];
    products<rows, others, same>(numbers + i * stride, numbers + j * stride, stride, count, result);
    for (int r = 0; r < rows; ++r) {
      for (int q = 0; q < (same ? r + 1 : others); ++q) {
        Double* at = i + r == j + q ? norm + i + r : matrix + lower(i + r, j + q);
        double* place = reinterpret_cast<double*>(at) + lane;
        *place = *place * (shrunk[i + r] * shrunk[j + q]) + result[r][q];
      }
    }
  }

  // The particles [i, i + rows), where 4 divides i, with themselves and with all before them.
  template <int rows>
  void with_all_before(int64_t i) const {
    for (int64_t j = 0; j < i; j += kOthers) tile<rows, kOthers, false>(i, j);
    tile<rows, rows, true>(i, i);
  }
};

template <class A>
void add_products(const AddProducts<A>& add, int64_t K) {
  int64_t i = 0;
  for (; i + 4 <= K; i += 4) add.template with_all_before<4>(i);
  switch (K - i) {
    case 3: return add.template with_all_before<3>(i);
    case 2: return add.template with_all_before<2>(i);
    case 1: return add.template with_all_before<1>(i);
  }
}

// Writes ‖e‖² of all particles and, if there is a matrix, F̃ᵀF̃ to lane `lane`, from the e of all
// classes.
void class_products(Double* e, int64_t stride, int64_t K, int64_t C, Double* norm, Double* matrix,
                    int lane) {
  for (int64_t i = 0; i < K; ++i) {
    Double squares(0.0);
    for (int64_t m = 0; m < stride; ++m) squares += e[i * stride + m] * e[i * stride + m];
    double total = sum(squares);
    reinterpret_cast<double*>(norm + i)[lane] = total;
    Double inverse(1 / __builtin_sqrt(total));
    for (int64_t m = 0; m < stride; ++m) e[i * stride + m] *= inverse;
  }
  if (!matrix) return;
  const double* f = reinterpret_cast<const double*>(e);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t m = 0; m * kExamples <= c; ++m) {
      Double total(0.0);
      for (int64_t i = 0; i < K; ++i) {
        total += Double(f[i * stride * kExamples + c]) * e[i * stride + m];
      }
      for (int64_t l = 0; l < min(kExamples, c + 1 - m * kExamples); ++l) {
        reinterpret_cast<double*>(matrix + lower(c, m * kExamples + l))[lane] = total[int(l)];
      }
    }
  }
}

// Computes top, sums and Gram matrix of an example in a lane; its logits (K, C) are `stride_k`
// apart.
template <class T>
void read_example(const CpuVolumeForward& p, const T* logits, int64_t stride_k, int64_t y, int lane,
                  const Example<Double>& x, const Chunk<accumulator_t<T>>& chunk) {
  using A = accumulator_t<T>;
  constexpr int lanes = Vec<A>::lanes;
  auto in_lane = [lane](Double* place) -> double& {
    return reinterpret_cast<double*>(place)[lane];
  };
  for (int64_t i = 0; i < p.K; ++i) {
    in_lane(x.top + i) = -kInfinity;
    in_lane(x.rest + i) = in_lane(x.norm + i) = 0;
    in_lane(x.own + i) = double(load(logits[i * stride_k + y]));
    for (int64_t j = 0; p.K < p.C && j < i; ++j) in_lane(x.matrix + lower(i, j)) = 0;
  }
  for (int64_t start = 0; start < p.C; start += chunk.vectors * lanes) {
    int64_t count = min(chunk.vectors * lanes, p.C - start), used = ceil_div(count, lanes);
    // There are two loops because a row's maximum and its sum both end in a chain of dependent
    // instructions, which overlaps with the next row.
    for (int64_t i = 0; i < p.K; ++i) {
      const T* row = logits + i * stride_k + start;
      chunk.tops[i] = take_row(row, count, y - start, chunk.e + i * chunk.vectors);
    }
    for (int64_t i = 0; i < p.K; ++i) {
      double before = in_lane(x.top + i), top = multilora::max(before, double(chunk.tops[i]));
      double factor = before == top ? 1 : before == -kInfinity ? 0 : shrink(before, top);
      const T* ahead = logits + i * stride_k + start + chunk.vectors * lanes;
      A total = exponentials(chunk.e + i * chunk.vectors, used, A(finite(top)), ahead);
      chunk.shrunk[i] = factor;
      in_lane(x.top + i) = top;
      in_lane(x.rest + i) = in_lane(x.rest + i) * factor + double(total);
    }
    if (p.K < p.C) {
      add_products<A>(
          {chunk.e, chunk.vectors * lanes, used * lanes, chunk.shrunk, x.norm, x.matrix, lane},
          p.K);
    }
  }
}

// The same where the matrix is over the classes: all in float64, from a copy of the logits.
template <class T>
void read_example_by_class(const CpuVolumeForward& p, const T* logits, int64_t y, int lane,
                           const Example<Double>& x, const Chunk<double>& chunk, double* wide) {
  widen_rows(logits, p.stride_k, p.K, p.C, wide);
  read_example(p, wide, p.C, y, lane, x, chunk);
  class_products(chunk.e, chunk.vectors, p.K, p.C, x.norm,
                 p.kind == VolumeKind::zero ? nullptr : x.matrix, lane);
}

// Harmless numbers for a lane without an example, or with an ignored one.
void fill_lane(const CpuVolumeForward& p, int lane, const Example<Double>& x) {
  auto set = [lane](Double* place, double number) {
    reinterpret_cast<double*>(place)[lane] = number;
  };
  for (int64_t i = 0; i < p.K; ++i) {
    set(x.top + i, 0);
    set(x.rest + i, 1);
    set(x.norm + i, 1);
    set(x.own + i, 0);
  }
  for (int64_t i = 0; i < min(p.K, p.C); ++i) {
    for (int64_t j = 0; j <= i; ++j) set(x.matrix + lower(i, j), i == j);
  }
}

// Returns the values; the matrices become core.
Double finish(const CpuVolumeForward& p, int count, const Example<Double>& x,
              const Example<double>& one) {
  int side = int(min(p.K, p.C));
  bool by_class = p.K >= p.C;
  normalise(SingleThread(), x, int(p.K), p.kind != VolumeKind::zero && !by_class);
  Double value(0.0);
  if (p.kind == VolumeKind::zero) return value;
  double log_eps = __builtin_log(p.eps);
  if (p.kind == VolumeKind::logdet && p.in_lanes) {
    return negative_log_det(SingleThread(), x, side, by_class, p.eps, log_eps);
  }
  // The examples come one after another: for "det" each has its own order of pivots.
  for (int lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < lower(side, 0); ++i) one.matrix[i] = x.matrix[i][lane];
    value.v[lane] = p.kind == VolumeKind::det
                        ? negative_det(SingleThread(), one, side)
                        : negative_log_det(SingleThread(), one, side, by_class, p.eps, log_eps);
    for (int64_t i = 0; i < lower(side, 0); ++i) x.matrix[i].v[lane] = one.matrix[i];
  }
  return value;
}

// Writes the core of one lane, or zeros.
template <class A>
void write_core(const Example<Double>& x, int64_t side, int lane, bool live, A* square) {
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      A number = live ? A(x.matrix[lower(i, j)][lane]) : A(0);
      square[i * side + j] = square[j * side + i] = number;
    }
  }
}

template <class T>
void forward(const CpuVolumeForward& p, int64_t first, int count, double* sums, void* memory) {
  using A = accumulator_t<T>;
  int64_t side = min(p.K, p.C);
  Scratch scratch{static_cast<char*>(memory)};
  Example<Double> x = take_example<Double>(scratch, p.K, side);
  Example<double> one = take_example<double>(scratch, p.K, side);
  bool by_class = p.K >= p.C, valid[kExamples];
  // Only one of the two chunks is used, so they may share their memory.
  Scratch same_place = scratch;
  Chunk<A> chunk(same_place, p.K, p.C);
  Chunk<double> wide_chunk(scratch, p.K, p.C);
  double* wide = by_class ? scratch.take<double>(p.K * p.C) : nullptr;
  for (int lane = 0; lane < kExamples; ++lane) {
    int64_t n = first + lane;
    valid[lane] = lane < count && p.targets[n * p.stride_target] != kIgnored;
    const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
    if (!valid[lane]) {
      fill_lane(p, lane, x);
    } else if (by_class) {
      read_example_by_class(p, logits, p.targets[n * p.stride_target], lane, x, wide_chunk, wide);
    } else {
      read_example(p, logits, p.stride_k, p.targets[n * p.stride_target], lane, x, chunk);
    }
  }
  Double value = finish(p, count, x, one);

  A* stats = static_cast<A*>(p.stats) + first;
  const Double* of_stats[] = {x.top, x.norm, x.rest};
  for (int64_t row = 0; row < 3 * p.K; ++row) {
    const Double& numbers = of_stats[row / p.K][row % p.K];
    for (int lane = 0; lane < count; ++lane) stats[row * p.N + lane] = A(numbers[lane]);
  }
  for (int lane = 0; lane < count; ++lane) {
    bool live = valid[lane] && p.kind != VolumeKind::zero;
    int64_t n = first + lane;
    if (by_class) {
      write_core(x, side, lane, live, static_cast<double*>(p.core) + n * side * side);
    } else {
      write_core(x, side, lane, live, static_cast<A*>(p.core) + n * side * side);
    }
    if (p.value) static_cast<A*>(p.value)[n] = valid[lane] ? A(value[lane]) : A(0);
  }
  if (!sums) return;
  for (int64_t i = 0; i <= p.K; ++i) {
    Double numbers = i < p.K ? cross_entropy(x.top[i], x.rest[i], x.own[i]) : value;
    double total = 0;
    for (int lane = 0; lane < count; ++lane) total += valid[lane] ? numbers[lane] : 0;
    sums[i] = total;
  }
}

int64_t forward_scratch(int64_t K, int64_t C) {
  Scratch scratch{nullptr};
  take_example<Double>(scratch, K, min(K, C));
  take_example<double>(scratch, K, min(K, C));
  Chunk<double>(scratch, K, C);
  if (K >= C) scratch.take<double>(K * C);
  return scratch.used;
}

}  // namespace

extern const VolumeForwardKernels volume_forward_kernels = {
    kExamples, forward_scratch, {forward<float>, forward<double>, forward<f16>, forward<bf16>}};

}  // namespace multilora::MULTILORA_LEVEL
