// gram_volume and particle_loss on the CPU, forward, for one level.
//
// A vector holds classes of one particle and example where the classes are read; chunks of them
// stay in the first-level cache, and what a chunk leaves is added up in float64. What follows is
// done for an example in every lane. Nothing that an example gives depends on what its neighbours
// are.
#include "volume_chunks.h"
#include "volume_kernels.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

using Double = Vec<double>;
constexpr int kExamples = Double::lanes;
constexpr double kInfinity = __builtin_inf();

template <class V>
Example<V> take_example(Scratch& scratch, int64_t K, int64_t side) {
  V *top = scratch.take<V>(K), *rest = scratch.take<V>(K), *norm = scratch.take<V>(K);
  V *own = scratch.take<V>(K), *matrix = scratch.take<V>(pair(side, 0));
  return {top, rest, norm, own, matrix, scratch.take<V>(side), scratch.take<V>(side)};
}

// Row `logits` of `count` numbers into whole vectors `e`, −∞ in padding and on the target, which is
// outside [0, count) where it is not in the row. -> the largest.
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

// e := exp(e − top) -> its sum and the sum of its squares. What is read next, `ahead`, is fetched
// meanwhile: nothing else reads.
template <class T, class A>
MULTILORA_HD void exponentials(Vec<A>* e, int64_t vectors, A top, const T* ahead, A& sum_of,
                               A& squares) {
  Vec<A> base(top), total(A(0)), square(A(0));
  for (int64_t m = 0; m < vectors; ++m) {
    __builtin_prefetch(ahead + m * Vec<A>::lanes);
    e[m] = exp(e[m] - base);
    total += e[m];
    square += e[m] * e[m];
  }
  sum_of = sum(total);
  squares = sum(square);
}

// ⟨e_i, e_j⟩ of one particle with `others` of them, `stride` apart.
template <int others, class A>
MULTILORA_HD void products(const Vec<A>* e, const Vec<A>* next, int64_t stride, int64_t vectors,
                           A* result) {
  Vec<A> total[others];
  for (int q = 0; q < others; ++q) total[q] = Vec<A>(A(0));
  for (int64_t m = 0; m < vectors; ++m) {
    for (int q = 0; q < others; ++q) total[q] += e[m] * next[q * stride + m];
  }
  for (int q = 0; q < others; ++q) result[q] = sum(total[q]);
}

// The Gram matrix of e off the diagonal, added to lane `lane` of what was there under an older
// maximum; `shrunk` (K) is what that turns to.
template <class A>
void add_products(const Vec<A>* e, int64_t stride, int64_t vectors, int64_t K, const double* shrunk,
                  Double* matrix, int lane) {
  for (int64_t i = 1; i < K; ++i) {
    for (int64_t j = 0; j < i; j += 4) {
      A result[4];
      int64_t others = least(4, i - j);
      const Vec<A>*own = e + i * stride, *next = e + j * stride;
      if (others == 4) products<4>(own, next, stride, vectors, result);
      if (others == 3) products<3>(own, next, stride, vectors, result);
      if (others == 2) products<2>(own, next, stride, vectors, result);
      if (others == 1) products<1>(own, next, stride, vectors, result);
      for (int64_t q = 0; q < others; ++q) {
        double* place = reinterpret_cast<double*>(matrix + pair(i, j + q)) + lane;
        *place = *place * (shrunk[i] * shrunk[j + q]) + double(result[q]);
      }
    }
  }
}

// F̃ᵀF̃ into lane `lane`, from the e of all classes and ‖e‖².
template <class A>
void class_products(Vec<A>* e, int64_t stride, int64_t K, int64_t C, const Double* squares,
                    Double* matrix, int lane) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t i = 0; i < K; ++i) {
    Vec<A> inverse(A(1 / __builtin_sqrt(squares[i][lane])));
    for (int64_t m = 0; m < stride; ++m) e[i * stride + m] *= inverse;
  }
  const A* f = reinterpret_cast<const A*>(e);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t m = 0; m * lanes <= c; ++m) {
      Vec<A> total(A(0));
      for (int64_t i = 0; i < K; ++i) {
        total += Vec<A>(f[i * stride * lanes + c]) * e[i * stride + m];
      }
      for (int64_t l = 0; l < least(lanes, c + 1 - m * lanes); ++l) {
        reinterpret_cast<double*>(matrix + pair(c, m * lanes + l))[lane] = double(total[int(l)]);
      }
    }
  }
}

// Top, sums and Gram matrix of example n into a lane.
template <class T>
void read_example(const VolumeForward& p, int64_t n, int lane, const Example<Double>& x,
                  const Chunk<accumulator_t<T>>& chunk) {
  using A = accumulator_t<T>;
  constexpr int lanes = Vec<A>::lanes;
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  int64_t y = p.targets[n * p.stride_target];
  bool by_class = p.K >= p.C, pairs = p.kind != VolumeKind::zero;
  auto in_lane = [lane](Double* place) -> double& {
    return reinterpret_cast<double*>(place)[lane];
  };
  for (int64_t i = 0; i < p.K; ++i) {
    in_lane(x.top + i) = -kInfinity;
    in_lane(x.rest + i) = in_lane(x.norm + i) = 0;
    in_lane(x.own + i) = double(load(logits[i * p.stride_k + y]));
    for (int64_t j = 0; pairs && !by_class && j < i; ++j) in_lane(x.matrix + pair(i, j)) = 0;
  }
  for (int64_t start = 0; start < p.C; start += chunk.vectors * lanes) {
    int64_t count = least(chunk.vectors * lanes, p.C - start), used = up(count, lanes);
    // In two loops: a row's maximum and sums each end in a chain of waits, which the next row
    // fills.
    for (int64_t i = 0; i < p.K; ++i) {
      const T* row = logits + i * p.stride_k + start;
      chunk.tops[i] = take_row(row, count, y - start, chunk.e + i * chunk.vectors);
    }
    for (int64_t i = 0; i < p.K; ++i) {
      double before = in_lane(x.top + i), top = multilora::max(before, double(chunk.tops[i]));
      double factor = before == top ? 1 : before == -kInfinity ? 0 : shrink(before, top);
      A total, squares;
      const T* ahead = logits + i * p.stride_k + start + chunk.vectors * lanes;
      exponentials(chunk.e + i * chunk.vectors, used, A(finite(top)), ahead, total, squares);
      chunk.shrunk[i] = factor;
      in_lane(x.top + i) = top;
      in_lane(x.rest + i) = in_lane(x.rest + i) * factor + double(total);
      in_lane(x.norm + i) = in_lane(x.norm + i) * (factor * factor) + double(squares);
    }
    if (pairs && !by_class) {
      add_products(chunk.e, chunk.vectors, used, p.K, chunk.shrunk, x.matrix, lane);
    }
  }
  if (pairs && by_class) {
    class_products(chunk.e, chunk.vectors, p.K, p.C, x.norm, x.matrix, lane);
  }
}

// Numbers that break nothing, for a lane without an example or with an ignored one.
void fill_lane(const VolumeForward& p, int lane, const Example<Double>& x) {
  auto set = [lane](Double* place, double number) {
    reinterpret_cast<double*>(place)[lane] = number;
  };
  for (int64_t i = 0; i < p.K; ++i) {
    set(x.top + i, 0);
    set(x.rest + i, 1);
    set(x.norm + i, 1);
    set(x.own + i, 0);
  }
  for (int64_t i = 0; i < least(p.K, p.C); ++i) {
    for (int64_t j = 0; j <= i; ++j) set(x.matrix + pair(i, j), i == j);
  }
}

// -> the values; the matrices become core.
Double finish(const VolumeForward& p, int count, const Example<Double>& x,
              const Example<double>& one) {
  int side = int(least(p.K, p.C));
  bool by_class = p.K >= p.C;
  normalise(Alone(), x, int(p.K), p.kind != VolumeKind::zero && !by_class);
  Double value(0.0);
  if (p.kind == VolumeKind::zero) return value;
  double log_eps = __builtin_log(p.eps);
  if (p.kind == VolumeKind::logdet && p.in_lanes) {
    return negative_log_det(Alone(), x, side, by_class, p.eps, log_eps);
  }
  // One after another. For "det" every example has its own order of pivots.
  for (int lane = 0; lane < count; ++lane) {
    for (int64_t i = 0; i < pair(side, 0); ++i) one.matrix[i] = x.matrix[i][lane];
    value.v[lane] = p.kind == VolumeKind::det
                        ? negative_det(Alone(), one, side)
                        : negative_log_det(Alone(), one, side, by_class, p.eps, log_eps);
    for (int64_t i = 0; i < pair(side, 0); ++i) x.matrix[i].v[lane] = one.matrix[i];
  }
  return value;
}

template <class T>
void forward(const VolumeForward& p, int64_t first, int count, double* sums, void* memory) {
  using A = accumulator_t<T>;
  int64_t side = least(p.K, p.C);
  Scratch scratch{static_cast<char*>(memory)};
  Example<Double> x = take_example<Double>(scratch, p.K, side);
  Example<double> one = take_example<double>(scratch, p.K, side);
  Chunk<A> chunk(scratch, p.K, p.C);
  bool valid[kExamples];
  for (int lane = 0; lane < kExamples; ++lane) {
    int64_t n = first + lane;
    valid[lane] = lane < count && p.targets[n * p.stride_target] != kIgnored;
    if (valid[lane]) {
      read_example<T>(p, n, lane, x, chunk);
    } else {
      fill_lane(p, lane, x);
    }
  }
  Double value = finish(p, count, x, one);

  A *stats = static_cast<A*>(p.stats) + first, *core = static_cast<A*>(p.core);
  const Double* of_stats[] = {x.top, x.norm, x.rest};
  for (int64_t row = 0; row < 3 * p.K; ++row) {
    const Double& numbers = of_stats[row / p.K][row % p.K];
    for (int lane = 0; lane < count; ++lane) stats[row * p.N + lane] = A(numbers[lane]);
  }
  for (int lane = 0; lane < count; ++lane) {
    A* square = core + (first + lane) * side * side;
    bool live = valid[lane] && p.kind != VolumeKind::zero;
    for (int64_t i = 0; i < side; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        A number = live ? A(x.matrix[pair(i, j)][lane]) : A(0);
        square[i * side + j] = square[j * side + i] = number;
      }
    }
    if (p.value) static_cast<A*>(p.value)[first + lane] = valid[lane] ? A(value[lane]) : A(0);
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
  take_example<Double>(scratch, K, least(K, C));
  take_example<double>(scratch, K, least(K, C));
  Chunk<double>(scratch, K, C);
  return scratch.used;
}

}  // namespace

extern const VolumeForwardKernels volume_forward_kernels = {
    kExamples, forward_scratch, {forward<float>, forward<double>, forward<f16>, forward<bf16>}};

}  // namespace multilora::MULTILORA_LEVEL
