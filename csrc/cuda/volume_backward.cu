// gram_volume and particle_loss on the GPU, backward: dz = f̃ ∘ (offset + 2·grad·(core F̃)) off the
// target.
#include "volume_tiles.h"

namespace multilora {
namespace {

constexpr int kThreads = 128;
constexpr int kFewThreads = 64;

// The numbers of an example's particles, in shared memory.
template <class A>
struct Particles {
  A *top, *inverse, *offset, *on_target;  // (K); inverse is 1/‖e‖
};

template <class A>
__device__ Particles<A> particles_at(A* memory, int K) {
  return {memory, memory + K, memory + 2 * K, memory + 3 * K};
}

// Member `rank` of `size` fills in its share of the particles.
template <class T, class A>
__device__ void weigh_particles(const CudaVolumeBackward& p, int64_t n, const T* logits, int64_t y,
                                int rank, int size, const Particles<A>& all) {
  using S = accumulator_t<T>;
  const S* stats = static_cast<const S*>(p.stats) + n;
  for (int i = rank; i < p.K; i += size) {
    A norm = stats[(p.K + i) * p.N];
    all.top[i] = stats[i * p.N];
    all.inverse[i] = 1 / norm;
    LossGradient<A> of_loss{0, 0};
    if (p.grad_nll) {
      A grad = static_cast<const S*>(p.grad_nll)[i * p.stride_nll];
      A weight = grad / *static_cast<const S*>(p.count), own = load(logits[i * p.stride_k + y]);
      of_loss = loss_gradient<A>(weight, all.top[i], norm, stats[(2 * p.K + i) * p.N], own);
    }
    all.offset[i] = of_loss.offset;
    all.on_target[i] = of_loss.on_target;
  }
}

// Twice the upstream gradient of the value.
template <class A>
__device__ A slope_of(const CudaVolumeBackward& p, int64_t n) {
  A grad = static_cast<const A*>(p.grad)[n * p.stride_grad];
  return 2 * (p.grad_nll ? grad / *static_cast<const A*>(p.count) : grad);
}

// For up to KB particles, fewer than classes. A thread holds some classes of all of them in
// registers.
template <class T, int KB>
__global__ void __launch_bounds__(kThreads) volume_gradient_kernel(const CudaVolumeBackward p) {
  using A = accumulator_t<T>;
  constexpr int M = kClasses<T>;
  MULTILORA_DYNAMIC_SHARED(memory);
  Lanes group(p.lanes);
  A* core = reinterpret_cast<A*>(memory) + int(threadIdx.x) / p.lanes * (KB * KB + 4 * KB);
  Particles<A> all = particles_at(core + KB * KB, KB);
  int64_t n = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / p.lanes;
  if (n >= p.N) return;
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  T* out = static_cast<T*>(p.out) + n * p.C;
  int64_t y = p.targets[n * p.stride_target];
  bool valid = y != kIgnored;
  if (valid) {
    weigh_particles(p, n, logits, y, group.rank(), group.size(), all);
    A slope = slope_of<A>(p, n);
    const A* saved = static_cast<const A*>(p.core) + n * p.K * p.K;
    for (int at = group.rank(); at < KB * KB; at += group.size()) {
      int i = at / KB, j = at % KB;
      core[at] = i < p.K && j < p.K ? saved[i * p.K + j] * slope : A(0);
    }
    // Fill in the particles that do not exist.
    for (int i = p.K + group.rank(); i < KB; i += group.size()) {
      all.top[i] = all.inverse[i] = all.offset[i] = all.on_target[i] = 0;
    }
  }
  group.sync();
  int64_t begin, end;
  own_classes(p.C, p.lanes * M, p.splits, begin, end);
  for (int64_t first = begin + group.rank() * M; first < end; first += p.lanes * M) {
    Pack<A, M> f[KB], x[KB];
    MULTILORA_UNROLL
    for (int i = 0; i < KB; ++i) {
      int64_t seen = i < p.K && valid ? end : 0;
      load_classes<M>(logits + i * p.stride_k, first, seen, p.aligned, f[i].v);
    }
    MULTILORA_UNROLL
    for (int i = 0; i < KB; ++i) {
      MULTILORA_UNROLL
      for (int m = 0; m < M; ++m) {
        f[i].v[m] = first + m == y ? A(0) : exp(f[i].v[m] - all.top[i]) * all.inverse[i];
      }
    }
    weigh(x, core, KB, f, 1, KB, all.offset);
    MULTILORA_UNROLL
    for (int i = 0; i < KB; ++i) {
      MULTILORA_UNROLL
      for (int m = 0; m < M; ++m) {
        x[i].v[m] = !valid ? A(0) : first + m == y ? all.on_target[i] : f[i].v[m] * x[i].v[m];
      }
      if (i < p.K) {
        store_classes<M>(out + i * p.N * p.C, first, end, p.aligned, x[i].v);
      }
    }
  }
}

// For up to 32 particles, fewer than classes. A block does one example, with f̃ in shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads)
    volume_gradient_of_many_kernel(const CudaVolumeBackward p) {
  using A = accumulator_t<T>;
  using V = Pack<A, 2>;
  constexpr int kRows = 4;
  MULTILORA_DYNAMIC_SHARED(memory);
  V* f = reinterpret_cast<V*>(memory);  // (K, kThreads)
  A* core = reinterpret_cast<A*>(f + p.K * kThreads);
  int rows = (p.K + kRows - 1) / kRows * kRows;
  Particles<A> all = particles_at(core + rows * p.K, rows);
  int64_t n = blockIdx.x;
  int self = int(threadIdx.x);
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  T* out = static_cast<T*>(p.out) + n * p.C;
  int64_t y = p.targets[n * p.stride_target];
  bool valid = y != kIgnored;
  if (valid) {
    weigh_particles(p, n, logits, y, self, kThreads, all);
    A slope = slope_of<A>(p, n);
    const A* saved = static_cast<const A*>(p.core) + n * p.K * p.K;
    for (int at = self; at < rows * p.K; at += kThreads) {
      core[at] = at < p.K * p.K ? saved[at] * slope : A(0);
    }
    for (int i = p.K + self; i < rows; i += kThreads) all.offset[i] = 0;
  }
  __syncthreads();
  int64_t begin, end;
  own_classes(p.C, 2 * kThreads, p.splits, begin, end);
  for (int64_t first = begin + 2 * self; first < end; first += 2 * kThreads) {
    // No barrier is needed: a thread reads only what it wrote to f itself.
    for (int i = 0; valid && i < p.K; ++i) {
      V z;
      load_classes<2>(logits + i * p.stride_k, first, end, p.aligned, z.v);
      MULTILORA_UNROLL
      for (int m = 0; m < 2; ++m) {
        z.v[m] = first + m == y ? A(0) : exp(z.v[m] - all.top[i]) * all.inverse[i];
      }
      f[i * kThreads + self] = z;
    }
    for (int i = 0; i < p.K; i += kRows) {
      V x[kRows];
      if (valid) {
        weigh(x, core + i * p.K, p.K, f + self, kThreads, p.K, all.offset + i);
      }
      MULTILORA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (i + r >= p.K) break;
        A dz[2] = {0, 0};
        MULTILORA_UNROLL
        for (int m = 0; valid && m < 2; ++m) {
          dz[m] =
              first + m == y ? all.on_target[i + r] : f[(i + r) * kThreads + self].v[m] * x[r].v[m];
        }
        store_classes<2>(out + (i + r) * p.N * p.C, first, end, p.aligned, dz);
      }
    }
  }
}

// For at least as many particles as classes. core is over the classes, everything is in float64, a
// warp does an example and a lane a particle.
template <class T>
__global__ void __launch_bounds__(kFewThreads, 8)
    volume_gradient_by_class_kernel(const CudaVolumeBackward p) {
  using A = accumulator_t<T>;
  MULTILORA_DYNAMIC_SHARED(memory);
  Lanes group(32);
  int K = p.K, C = int(p.C);
  double* f = reinterpret_cast<double*>(memory) + int(threadIdx.x) / 32 * (2 * K * C + 4 * K);
  double* x = f + K * C;
  Particles<double> all = particles_at(x + K * C, K);
  int64_t n = (int64_t(blockIdx.x) * kFewThreads + threadIdx.x) / 32;
  if (n >= p.N) return;
  const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
  T* out = static_cast<T*>(p.out) + n * C;
  int64_t y = p.targets[n * p.stride_target];
  if (y == kIgnored) {
    for (int at = group.rank(); at < K * C; at += group.size()) {
      store(out + at / C * p.N * C + at % C, A(0));
    }
    return;
  }
  weigh_particles(p, n, logits, y, group.rank(), group.size(), all);
  double slope = slope_of<A>(p, n);
  const double* core = static_cast<const double*>(p.core) + n * C * C;
  for (int i = group.rank(); i < K; i += group.size()) {
    double *own = f + i * C, *weighed = x + i * C, along = 0;
    for (int c = 0; c < C; ++c) {
      double z = load(logits[i * p.stride_k + c]);
      own[c] = c == y ? 0 : exp(z - all.top[i]) * all.inverse[i];
    }
    for (int c = 0; c < C; ++c) {
      double total = 0;
      for (int d = 0; d < C; ++d) total += own[d] * core[d * C + c];
      weighed[c] = total * slope;
      along += weighed[c] * own[c];
    }
    for (int c = 0; c < C; ++c) {
      double dz = own[c] * (weighed[c] - along * own[c] + all.offset[i]);
      store(out + i * p.N * C + c, c == y ? all.on_target[i] : dz);
    }
  }
}

// As in the forward pass. Nothing is merged here, so there may be as many parts as fill the chip.
constexpr int64_t kFull = 1 << 17;

int parts(int64_t threads, int64_t C, int64_t step) {
  int64_t splits = kFull / threads, most = C / (4 * step);
  splits = splits < most ? splits : most;
  return splits < 1 ? 1 : splits > 1024 ? 1024 : int(splits);
}

}  // namespace

void volume_backward(CudaVolumeBackward p, DType dtype, Stream stream) {
  if (p.N == 0) return;
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    bool many = p.K > 8;
    int each = many ? 2 : kClasses<T>;
    p.aligned = is_aligned<T>(p.logits, each, p.stride_k, p.stride_n) &&
                is_aligned<T>(p.out, each, p.N * p.C, p.C);
    if (p.K >= p.C) {
      size_t bytes = kFewThreads / 32 * (2 * p.K * p.C + 4 * p.K) * sizeof(double);
      launch(volume_gradient_by_class_kernel<T>, unsigned(ceil_div(p.N * 32, kFewThreads)),
             kFewThreads, bytes, stream, p);
    } else if (many) {
      int rows = ceil_div(p.K, 4) * 4;
      p.splits = parts(p.N * kThreads, p.C, 2 * kThreads);
      size_t bytes = (2 * p.K * kThreads + rows * p.K + 4 * rows) * sizeof(A);
      launch(volume_gradient_of_many_kernel<T>, dim3(unsigned(p.N), unsigned(p.splits)), kThreads,
             bytes, stream, p);
    } else {
      int KB = p.K > 4 ? 8 : p.K > 2 ? 4 : 2;
      p.lanes = power_of_two(ceil_div(p.C, each));
      p.lanes = p.lanes < 4 ? 4 : p.lanes > 32 ? 32 : p.lanes;
      p.splits = parts(p.N * p.lanes, p.C, p.lanes * each);
      auto kernel = KB == 8   ? volume_gradient_kernel<T, 8>
                    : KB == 4 ? volume_gradient_kernel<T, 4>
                              : volume_gradient_kernel<T, 2>;
      size_t bytes = size_t(kThreads / p.lanes) * (KB * KB + 4 * KB) * sizeof(A);
      launch(kernel, dim3(unsigned(ceil_div(p.N * p.lanes, kThreads)), unsigned(p.splits)),
             kThreads, bytes, stream, p);
    }
  });
}

}  // namespace multilora
