// gram_volume and particle_loss on the GPU, forward. A first kernel reads the logits and leaves,
// for every example, sums over parts of its classes; a second kernel computes the results from them
// in float64.
#include "volume_tiles.h"

namespace multilora {
namespace {

// The second number in __launch_bounds__ is how many blocks a processor must hold. Without it the
// compiler aims at more blocks and spills registers.
constexpr int kThreads = 128;
// The block size of kernels that need much shared memory: the second one, and the first one for
// many particles.
constexpr int kFewThreads = 64;
constexpr int kMeanThreads = 512;

// The numbers of a part of an example: top (K), rest (K), the lower triangle of the Gram matrix.
MULTILORA_HD int64_t numbers_of_part(int64_t K) { return 2 * K + lower(K, 0); }

__device__ inline double* part_of(const CudaVolumeForward& p, int64_t split, int64_t n) {
  return p.parts + (split * p.N + n) * numbers_of_part(p.K);
}

// For up to KB particles. A thread takes some classes of all particles, so that it can add up its
// part of the Gram matrix, under its own running maximum, without communication.
template <class T, int KB>
__global__ void __launch_bounds__(kThreads, 2) volume_sums_kernel(const CudaVolumeForward p) {
  using A = accumulator_t<T>;
  constexpr int M = kClasses<T>;
  Lanes group(p.lanes);
  int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / p.lanes;
  if (n >= p.N) return;
  int64_t y = p.targets[n * p.stride_target];
  if (!takes_part(y, p.C)) return;
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  int64_t begin, end;
  own_classes(p.C, p.lanes * M, p.splits, begin, end);

  A top[KB], rest[KB];
  double factor[KB], gram[KB * (KB + 1) / 2];
  MULTILORA_UNROLL
  for (int i = 0; i < KB; ++i) {
    top[i] = -INFINITY;
    rest[i] = 0;
    MULTILORA_UNROLL
    for (int j = 0; j <= i; ++j) gram[lower(i, j)] = 0;
  }
  for (int64_t first = begin + group.rank() * M; first < end; first += p.lanes * M) {
    A e[KB][M];
    MULTILORA_UNROLL
    for (int i = 0; i < KB; ++i) {
      // A particle that does not exist reads no class.
      load_classes<M>(logits + i * p.stride_k, first, i < p.K ? end : 0, p.aligned, e[i]);
    }
    MULTILORA_UNROLL
    for (int i = 0; i < KB; ++i) {
      A highest = top[i];
      MULTILORA_UNROLL
      for (int m = 0; m < M; ++m) {
        if (first + m == y) e[i][m] = -INFINITY;
        highest = max(highest, e[i][m]);
      }
      A base = finite(highest), total = 0, shrunk = exp(top[i] - base);
      MULTILORA_UNROLL
      for (int m = 0; m < M; ++m) {
        e[i][m] = exp(e[i][m] - base);
        total += e[i][m];
      }
      top[i] = highest;
      rest[i] = rest[i] * shrunk + total;
      factor[i] = shrunk;
      MULTILORA_UNROLL
      for (int j = 0; j <= i; ++j) {
        double product = 0;
        MULTILORA_UNROLL
        for (int m = 0; m < M; ++m) product += double(e[i][m]) * double(e[j][m]);
        gram[lower(i, j)] = gram[lower(i, j)] * (factor[i] * factor[j]) + product;
      }
    }
  }

  double* part = part_of(p, blockIdx.y, n);
  MULTILORA_UNROLL
  for (int i = 0; i < KB; ++i) {
    A highest = group.max(top[i]);
    A shrunk = shrink(top[i], highest);
    factor[i] = shrunk;
    A total = group.sum(rest[i] * shrunk);
    bool writes = i < p.K && group.rank() == 0;
    if (writes) {
      part[i] = highest;
      part[p.K + i] = total;
    }
    MULTILORA_UNROLL
    for (int j = 0; j <= i; ++j) {
      double product = group.sum(gram[lower(i, j)] * (factor[i] * factor[j]));
      if (writes) part[2 * p.K + lower(i, j)] = product;
    }
  }
}

// For up to 32 particles. A warp brings its classes into shared memory, kStep at a time. A lane
// first does one particle, then 4 x 8 elements of the Gram matrix.
constexpr int kStep = 64;
// The stride of a class in shared memory: a multiple of 4 that spreads the classes over the banks.
constexpr int kColumn = kMostParticles + 4;

template <class T>
__global__ void __launch_bounds__(kFewThreads)
    volume_sums_of_many_kernel(const CudaVolumeForward p) {
  using A = accumulator_t<T>;
  MULTILORA_DYNAMIC_SHARED(memory);
  Lanes group(32);
  int lane = group.rank(), warp = int(threadIdx.x) / 32;
  double* e = reinterpret_cast<double*>(memory) + warp * (kStep + 1) * kColumn;
  double* factors = e + kStep * kColumn;
  int64_t n = int64_t(blockIdx.x) * (kFewThreads / 32) + warp;
  if (n >= p.N) return;
  int64_t y = p.targets[n * p.stride_target];
  if (!takes_part(y, p.C)) return;
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  int64_t begin, end;
  own_classes(p.C, kStep, p.splits, begin, end);

  A top = -INFINITY;
  double rest = 0, gram[4][8] = {};
  int row = lane / 4 * 4, column = lane % 4 * 8;
  if (lane >= p.K) {
    for (int c = 0; c < kStep; ++c) e[c * kColumn + lane] = 0;
  }
  for (int64_t start = begin; start < end; start += kStep) {
    for (int i = 0; i < p.K; ++i) {
      MULTILORA_UNROLL
      for (int c = lane; c < kStep; c += 32) {
        bool seen = start + c < end && start + c != y;
        e[c * kColumn + i] = seen ? load(logits[i * p.stride_k + start + c]) : A(-INFINITY);
      }
    }
    group.sync();
    if (lane < p.K) {
      A highest = top, total = 0;
      for (int c = 0; c < kStep; ++c) highest = max(highest, A(e[c * kColumn + lane]));
      A base = finite(highest), factor = exp(top - base);
      for (int c = 0; c < kStep; ++c) {
        A number = exp(A(e[c * kColumn + lane]) - base);
        e[c * kColumn + lane] = number;
        total += number;
      }
      top = highest;
      rest = rest * factor + total;
      factors[lane] = factor;
    } else {
      factors[lane] = 0;
    }
    group.sync();
    MULTILORA_UNROLL
    for (int r = 0; r < 4; ++r) {
      MULTILORA_UNROLL
      for (int q = 0; q < 8; ++q) gram[r][q] *= factors[row + r] * factors[column + q];
    }
    for (int c = 0; c < kStep; ++c) {
      MULTILORA_UNROLL
      for (int r = 0; r < 4; ++r) {
        MULTILORA_UNROLL
        for (int q = 0; q < 8; ++q) {
          gram[r][q] += e[c * kColumn + row + r] * e[c * kColumn + column + q];
        }
      }
    }
    group.sync();
  }

  double* part = part_of(p, blockIdx.y, n);
  if (lane < p.K) {
    part[lane] = top;
    part[p.K + lane] = rest;
  }
  MULTILORA_UNROLL
  for (int r = 0; r < 4; ++r) {
    MULTILORA_UNROLL
    for (int q = 0; q < 8; ++q) {
      int i = row + r, j = column + q;
      if (i < p.K && j <= i) part[2 * p.K + lower(i, j)] = gram[r][q];
    }
  }
}

// --- what follows from the sums ------------------------------------------------------------------

// The doubles of shared memory that an example needs.
int64_t shared_doubles(const CudaVolumeForward& p) {
  int64_t side = p.K < p.C ? p.K : p.C;
  int64_t factors = p.splits > 1 ? p.splits * p.K : 0, f = p.K < p.C ? 0 : p.K * p.C;
  return 4 * p.K + lower(side, 0) + 2 * side + factors + f;
}

// The row of an element of a lower triangle. For such small numbers float32's root is exact enough.
__device__ inline int row_of(int index) { return (int(sqrtf(8.0f * index + 1)) - 1) / 2; }

// Adds up the parts under their common maximum.
__device__ inline void merge_parts(const Lanes& group, const CudaVolumeForward& p, int64_t n,
                                   const Example<double>& x, double* factors) {
  int K = p.K;
  for (int i = group.rank(); i < K; i += group.size()) {
    double top = -INFINITY;
    for (int s = 0; s < p.splits; ++s) top = max(top, part_of(p, s, n)[i]);
    x.top[i] = top;
  }
  group.sync();
  for (int at = group.rank(); at < p.splits * K; at += group.size()) {
    factors[at] = shrink(part_of(p, at / K, n)[at % K], x.top[at % K]);
  }
  group.sync();
  for (int i = group.rank(); i < K; i += group.size()) {
    double rest = 0;
    for (int s = 0; s < p.splits; ++s) rest += part_of(p, s, n)[K + i] * factors[s * K + i];
    x.rest[i] = rest;
  }
  for (int at = group.rank(); at < lower(K, 0); at += group.size()) {
    int i = row_of(at), j = at - int(lower(i, 0));
    double product = 0;
    for (int s = 0; s < p.splits; ++s) {
      double factor = factors[s * K + i] * factors[s * K + j];
      product += part_of(p, s, n)[2 * K + at] * factor;
    }
    if (K < p.C) x.matrix[at] = product;
    if (i == j) x.norm[i] = product;
  }
  group.sync();
}

__device__ inline void take_part(const Lanes& group, const CudaVolumeForward& p, int64_t n,
                                 const Example<double>& x) {
  const double* part = part_of(p, 0, n);
  for (int i = group.rank(); i < p.K; i += group.size()) {
    x.top[i] = part[i];
    x.rest[i] = part[p.K + i];
    x.norm[i] = part[2 * p.K + lower(i, i)];
  }
  for (int at = group.rank(); p.K < p.C && at < lower(p.K, 0); at += group.size()) {
    x.matrix[at] = part[2 * p.K + at];
  }
  group.sync();
}

// Computes F̃ᵀF̃ from the logits, which are read a second time.
template <class T>
__device__ void class_gram(const Lanes& group, const CudaVolumeForward& p, const T* logits,
                           int64_t y, const Example<double>& x, double* f) {
  int K = p.K, C = int(p.C);
  for (int at = group.rank(); at < K * C; at += group.size()) {
    int i = at / C, c = at % C;
    double z = load(logits[i * p.stride_k + c]);
    f[at] = c == y ? 0 : exp(z - x.top[i]) / x.norm[i];
  }
  group.sync();
  for (int at = group.rank(); at < lower(C, 0); at += group.size()) {
    int c = row_of(at), d = at - int(lower(c, 0));
    double product = 0;
    for (int i = 0; i < K; ++i) product += f[i * C + c] * f[i * C + d];
    x.matrix[at] = product;
  }
  group.sync();
}

template <class T>
__global__ void __launch_bounds__(kFewThreads, 8)
    volume_finish_kernel(const CudaVolumeForward p, int lanes, int doubles) {
  using A = accumulator_t<T>;
  MULTILORA_DYNAMIC_SHARED(memory);
  Lanes group(lanes);
  int K = p.K, side = K < p.C ? K : int(p.C);
  double* own = reinterpret_cast<double*>(memory) + int(threadIdx.x) / lanes * doubles;
  double* matrix = own + 4 * K;
  double* column = matrix + lower(side, 0);
  Example<double> x{own, own + K, own + 2 * K, own + 3 * K, matrix, column, column + side};
  double* extra = column + 2 * side;
  int64_t n = (int64_t(blockIdx.x) * kFewThreads + threadIdx.x) / lanes;
  if (n >= p.N) return;
  int64_t y = p.targets[n * p.stride_target];
  // The first kernel has checked all other targets.
  bool valid = y != kIgnored, by_class = K >= p.C;
  bool moves = valid && p.kind != VolumeKind::zero;
  double value = 0;
  if (valid) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
    for (int i = group.rank(); i < K; i += group.size()) {
      x.own[i] = load(logits[i * p.stride_k + y]);
    }
    if (p.splits > 1) {
      merge_parts(group, p, n, x, extra);
    } else {
      take_part(group, p, n, x);
    }
    normalise(group, x, K, moves && !by_class);
    if (moves && by_class) class_gram(group, p, logits, y, x, extra);
    if (p.kind == VolumeKind::logdet) {
      value = negative_log_det(group, x, side, by_class, p.eps, p.log_eps);
    } else if (p.kind == VolumeKind::det) {
      value = negative_det(group, x, side);
    }
  }

  A* stats = static_cast<A*>(p.stats) + n;
  A* losses = static_cast<A*>(p.losses);
  for (int i = group.rank(); i < K; i += group.size()) {
    // An ignored example gets harmless numbers.
    stats[i * p.N] = valid ? A(x.top[i]) : A(0);
    stats[(K + i) * p.N] = valid ? A(x.norm[i]) : A(1);
    stats[(2 * K + i) * p.N] = valid ? A(x.rest[i]) : A(1);
    if (losses) {
      losses[i * p.N + n] = valid ? A(cross_entropy(x.top[i], x.rest[i], x.own[i])) : A(0);
    }
  }
  for (int at = group.rank(); at < side * side; at += group.size()) {
    int i = at / side, j = at % side;
    double number = moves ? x.matrix[i < j ? lower(j, i) : lower(i, j)] : 0;
    int64_t place = n * side * side + at;
    if (by_class) {
      static_cast<double*>(p.core)[place] = number;
    } else {
      static_cast<A*>(p.core)[place] = A(number);
    }
  }
  if (group.rank() == 0) static_cast<A*>(p.value)[n] = A(value);
}

template <class A>
__global__ void __launch_bounds__(kMeanThreads)
    volume_means_kernel(const A* rows, const int64_t* targets, int64_t stride_target, A* nll,
                        A* divergence, A* count, int64_t N) {
  MULTILORA_SHARED(double, totals, 2 * kMeanThreads / 32);
  const A* row = rows + blockIdx.x * N;
  double total = 0, valid = 0;
  for (int64_t n = threadIdx.x; n < N; n += kMeanThreads) {
    total += row[n];
    valid += targets[n * stride_target] != kIgnored;
  }
  Lanes group(32);
  total = group.sum(total);
  valid = group.sum(valid);
  int warp = int(threadIdx.x) / 32;
  if (group.rank() == 0) {
    totals[2 * warp] = total;
    totals[2 * warp + 1] = valid;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  total = valid = 0;
  for (int w = 0; w < kMeanThreads / 32; ++w) {
    total += totals[2 * w];
    valid += totals[2 * w + 1];
  }
  valid = max(valid, 1.0);
  if (blockIdx.x + 1 < gridDim.x) {
    nll[blockIdx.x] = A(total / valid);
  } else {
    *divergence = A(total / valid);
    *count = A(valid);
  }
}

// --- launches ------------------------------------------------------------------------------------

// This many threads fill the largest chips (132 processors) a few times.
constexpr int64_t kFull = 1 << 17;

// Chooses the threads per example, as few as cover its classes at once, and the parts of its
// classes: enough to fill the chip, of at least 8 steps each, but few, because the second kernel
// keeps a number per particle and part in shared memory.
void plan(CudaVolumeForward& p, int classes_each) {
  bool many = p.K > 8;
  p.lanes = many ? 32 : power_of_two(ceil_div(p.C, classes_each));
  p.lanes = p.lanes < 4 ? 4 : p.lanes > 32 ? 32 : p.lanes;
  int64_t step = many ? kStep : p.lanes * classes_each;
  int64_t splits = kFull / (p.N * p.lanes), most = p.C / (8 * step), kept = 512 / p.K;
  splits = splits < most ? splits : most;
  splits = splits < kept ? splits : kept;
  p.splits = splits < 1 ? 1 : splits > 64 ? 64 : int(splits);
}

}  // namespace

int64_t volume_parts(int K, int64_t N, int64_t C, DType dtype) {
  CudaVolumeForward p{};
  p.K = K;
  p.N = N < 1 ? 1 : N;
  p.C = C;
  plan(p, dtype == DType::f64 ? kClasses<double> : kClasses<float>);
  return p.splits * N * numbers_of_part(K);
}

void volume_forward(CudaVolumeForward p, DType dtype, Stream stream) {
  if (p.N == 0) return;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int M = kClasses<T>;
    plan(p, M);
    p.aligned = is_aligned<T>(p.logits, M, p.stride_k, p.stride_n);
    if (p.K > 8) {
      dim3 grid(unsigned(ceil_div(p.N, kFewThreads / 32)), unsigned(p.splits));
      size_t bytes = kFewThreads / 32 * (kStep + 1) * kColumn * sizeof(double);
      launch(volume_sums_of_many_kernel<T>, grid, kFewThreads, bytes, stream, p);
    } else {
      auto kernel = p.K > 4   ? volume_sums_kernel<T, 8>
                    : p.K > 2 ? volume_sums_kernel<T, 4>
                              : volume_sums_kernel<T, 2>;
      dim3 grid(unsigned(ceil_div(p.N * p.lanes, kThreads)), unsigned(p.splits));
      launch(kernel, grid, kThreads, 0, stream, p);
    }
    // A whole warp where there is much to merge.
    int lanes = p.splits > 1 || p.K > 16 ? 32 : p.K > 8 ? 16 : p.K > 4 ? 8 : 4;
    int doubles = int(shared_doubles(p));
    size_t bytes = size_t(kFewThreads / lanes) * doubles * sizeof(double);
    launch(volume_finish_kernel<T>, unsigned(ceil_div(p.N * lanes, kFewThreads)), kFewThreads,
           bytes, stream, p, lanes, doubles);
  });
}

void volume_means(const void* rows, const int64_t* targets, int64_t stride_target, void* nll,
                  void* divergence, void* count, int K, int64_t N, DType dtype, Stream stream) {
  with_type(dtype, [&](auto zero) {
    using A = accumulator_t<decltype(zero)>;
    launch(volume_means_kernel<A>, unsigned(K) + 1, kMeanThreads, 0, stream,
           static_cast<const A*>(rows), targets, stride_target, static_cast<A*>(nll),
           static_cast<A*>(divergence), static_cast<A*>(count), N);
  });
}

}  // namespace multilora
