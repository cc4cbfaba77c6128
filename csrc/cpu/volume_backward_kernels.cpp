// gram_volume and particle_loss on the CPU, backward, for one level. Chunks of f̃ stay in the
// first-level cache.
#include <type_traits>

#include "volume_chunks.h"
#include "volume_kernels.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

// Arrays over the particles, in whole vectors.
template <class A>
struct Particles {
  Vec<A>*weight, *top, *norm, *rest, *own, *offset, *on_target;

  Particles(Scratch& scratch, int64_t K) {
    Vec<A>** arrays[] = {&weight, &top, &norm, &rest, &own, &offset, &on_target};
    int64_t vectors = ceil_div(K, Vec<A>::lanes);
    for (Vec<A>** array : arrays) *array = scratch.take<Vec<A>>(vectors);
    for (int64_t m = 0; scratch.memory && m < vectors; ++m) {
      weight[m] = top[m] = own[m] = Vec<A>(A(0));
      norm[m] = rest[m] = Vec<A>(A(1));
    }
  }
};

// Computes the offsets, the gradients on the target and 1/‖e‖ (in `norm`) of example n.
template <class T, class A>
void weigh_particles(const CpuVolumeBackward& p, int64_t n, const T* logits, int64_t y,
                     const Particles<A>& all) {
  using S = accumulator_t<T>;
  const S* stats = static_cast<const S*>(p.stats) + n;
  const S* grad_nll = static_cast<const S*>(p.grad_nll);
  A count = grad_nll ? A(*static_cast<const S*>(p.count)) : A(1);
  auto set = [](Vec<A>* array, int64_t i, A number) { reinterpret_cast<A*>(array)[i] = number; };
  int64_t vectors = ceil_div(p.K, Vec<A>::lanes);
  for (int64_t i = 0; i < p.K; ++i) {
    set(all.top, i, stats[i * p.N]);
    set(all.norm, i, stats[(p.K + i) * p.N]);
    set(all.rest, i, stats[(2 * p.K + i) * p.N]);
    if (grad_nll) {
      set(all.own, i, load(logits[i * p.stride_k + y]));
      set(all.weight, i, grad_nll[i * p.stride_nll] / count);
    }
  }
  for (int64_t m = 0; m < vectors; ++m) {
    LossGradient<Vec<A>> of_loss{Vec<A>(A(0)), Vec<A>(A(0))};
    if (grad_nll) {
      of_loss = loss_gradient(all.weight[m], all.top[m], all.norm[m], all.rest[m], all.own[m]);
    }
    all.offset[m] = of_loss.offset;
    all.on_target[m] = of_loss.on_target;
    all.norm[m] = Vec<A>(A(1)) / all.norm[m];
  }
}

// Twice the upstream gradient of the value of example n.
template <class S>
S slope_of(const CpuVolumeBackward& p, int64_t n) {
  S grad = static_cast<const S*>(p.grad)[n * p.stride_grad];
  return 2 * (p.grad_nll ? grad / *static_cast<const S*>(p.count) : grad);
}

// Computes f̃ of a chunk, zero on the target and in the padding.
template <class T, class A>
void normalised(const T* logits, int64_t stride_k, int64_t count, int64_t target, int64_t K,
                const Particles<A>& all, const Chunk<A>& chunk) {
  constexpr int lanes = Vec<A>::lanes;
  using Int = typename Vec<A>::Int;
  int64_t full = count / lanes;
  for (int64_t i = 0; i < K; ++i) {
    const T* row = logits + i * stride_k;
    Vec<A>* f = chunk.e + i * chunk.vectors;
    Vec<A> top(reinterpret_cast<const A*>(all.top)[i]);
    Vec<A> inverse(reinterpret_cast<const A*>(all.norm)[i]);
    for (int64_t m = 0; m < full; ++m) {
      __builtin_prefetch(row + (chunk.vectors + m) * lanes);
      f[m] = exp(load_vector(row + m * lanes) - top) * inverse;
    }
    if (int rest = int(count - full * lanes)) {
      Vec<A> z = load_vector(row + full * lanes, rest);
      f[full] = where<A>(lane_numbers<A>() < Int(rest), exp(z - top) * inverse, Vec<A>(A(0)));
    }
    if (target >= 0 && target < count) reinterpret_cast<A*>(f)[target] = A(0);
  }
}

// Writes the gradients of a chunk for `rows` particles from i on, where K < C.
template <int rows, class T, class A>
void write_rows(T* out, int64_t next, int64_t count, int64_t K, int64_t i, const A* core,
                const A* offset, const Chunk<A>& chunk, bool stream) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t m = 0; m < ceil_div(count, lanes); ++m) {
    Vec<A> x[rows];
    weigh<rows>(x, core + i * K, K, chunk.e + m, chunk.vectors, int(K), offset + i);
    for (int r = 0; r < rows; ++r) {
      T* place = out + (i + r) * next + m * lanes;
      Vec<A> dz = x[r] * chunk.e[(i + r) * chunk.vectors + m];
      if constexpr (sizeof(T) >= 4) {
        if (stream) {
          stream_vector(place, dz);
          continue;
        }
      }
      if ((m + 1) * lanes <= count) {
        store_vector(place, dz);
      } else {
        store_vector(place, dz, int(count - m * lanes));
      }
    }
  }
}

// The scratch memory of a backward pass where K < C.
template <class A>
struct ByParticle {
  Chunk<A> chunk;
  Particles<A> particles;
  A* core;  // (K, K), times twice the upstream gradient

  ByParticle(Scratch& scratch, int64_t K, int64_t C)
      : chunk(scratch, K, C), particles(scratch, K), core(scratch.take<A>(K * K)) {}
};

// Does the classes [begin, end) of an example, where K < C.
template <class T, class A>
void backward_by_particle(const CpuVolumeBackward& p, int64_t n, const T* logits, int64_t y, T* out,
                          int64_t begin, int64_t end, const ByParticle<A>& s) {
  constexpr int lanes = Vec<A>::lanes;
  weigh_particles(p, n, logits, y, s.particles);
  const A* core = static_cast<const A*>(p.core) + n * p.K * p.K;
  const A* offset = reinterpret_cast<const A*>(s.particles.offset);
  A slope = slope_of<A>(p, n);
  for (int64_t i = 0; i < p.K * p.K; ++i) s.core[i] = core[i] * slope;
  int64_t size = p.N * p.C;
  for (int64_t start = begin; start < end; start += s.chunk.vectors * lanes) {
    int64_t count = min(s.chunk.vectors * lanes, end - start);
    normalised(logits + start, p.stride_k, count, y - start, p.K, s.particles, s.chunk);
    for (int64_t i = 0; i < p.K; i += 4) {
      auto rows = [&](auto number) {
        write_rows<decltype(number)::value>(out + start, size, count, p.K, i, s.core, offset,
                                            s.chunk, p.stream);
      };
      switch (min(p.K - i, 4)) {
        case 4: rows(std::integral_constant<int, 4>()); break;
        case 3: rows(std::integral_constant<int, 3>()); break;
        case 2: rows(std::integral_constant<int, 2>()); break;
        default: rows(std::integral_constant<int, 1>());
      }
    }
  }
  if (y >= begin && y < end) {
    for (int64_t i = 0; i < p.K; ++i) {
      store(out + i * size + y, reinterpret_cast<const A*>(s.particles.on_target)[i]);
    }
  }
}

// The scratch memory where K >= C: all in float64.
struct ByClass {
  Chunk<double> chunk;
  Particles<double> particles;
  int64_t next;
  double *core, *wide;  // (C, next), times twice the upstream gradient, zero-padded; (K, C)
  Vec<double>* x;       // (vectors of the chunk)

  ByClass(Scratch& scratch, int64_t K, int64_t C)
      : chunk(scratch, K, C),
        particles(scratch, K),
        next(chunk.vectors * Vec<double>::lanes),
        core(scratch.take<double>(C * next)),
        wide(scratch.take<double>(K * C)),
        x(scratch.take<Vec<double>>(chunk.vectors)) {}
};

// Does all classes of an example, where K >= C.
template <class T>
void backward_by_class(const CpuVolumeBackward& p, int64_t n, const T* logits, int64_t y, T* out,
                       const ByClass& s) {
  constexpr int lanes = Vec<double>::lanes;
  weigh_particles(p, n, logits, y, s.particles);
  const double* core = static_cast<const double*>(p.core) + n * p.C * p.C;
  double slope = slope_of<accumulator_t<T>>(p, n);
  for (int64_t i = 0; i < p.C; ++i) {
    for (int64_t j = 0; j < s.next; ++j) {
      s.core[i * s.next + j] = j < p.C ? core[i * p.C + j] * slope : 0;
    }
  }
  widen_rows(logits, p.stride_k, p.K, p.C, s.wide);
  normalised(s.wide, p.C, p.C, y, p.K, s.particles, s.chunk);
  for (int64_t i = 0; i < p.K; ++i) {
    const Vec<double>* f = s.chunk.e + i * s.chunk.vectors;
    const double* numbers = reinterpret_cast<const double*>(f);
    Vec<double> along(0.0);
    for (int64_t m = 0; m < s.chunk.vectors; ++m) {
      s.x[m] = Vec<double>(0.0);
      for (int64_t c = 0; c < p.C; ++c) {
        s.x[m] += Vec<double>(numbers[c]) * load_vector(s.core + c * s.next + m * lanes);
      }
      along += s.x[m] * f[m];
    }
    Vec<double> total(sum(along)), offset(reinterpret_cast<double*>(s.particles.offset)[i]);
    for (int64_t m = 0; m < s.chunk.vectors; ++m) {
      s.x[m] = (s.x[m] - total * f[m] + offset) * f[m];
    }
    const double* dz = reinterpret_cast<const double*>(s.x);
    T* row = out + i * p.N * p.C;
    for (int64_t c = 0; c < p.C; ++c) store(row + c, dz[c]);
    store(row + y, reinterpret_cast<const double*>(s.particles.on_target)[i]);
  }
}

template <class T>
void backward(const CpuVolumeBackward& p, int64_t first, int64_t last, int64_t begin, int64_t end,
              void* memory) {
  auto each = [&](auto run) {
    for (int64_t n = first; n < last; ++n) {
      const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
      T* out = static_cast<T*>(p.out) + n * p.C;
      int64_t y = p.targets[n * p.stride_target];
      if (y != kIgnored) {
        run(n, logits, y, out);
        continue;
      }
      for (int64_t i = 0; i < p.K; ++i) {
        memset(out + i * p.N * p.C + begin, 0, size_t(end - begin) * sizeof(T));
      }
    }
  };
  Scratch scratch{static_cast<char*>(memory)};
  if (p.K >= p.C) {
    ByClass s(scratch, p.K, p.C);
    each([&](int64_t n, const T* logits, int64_t y, T* out) {
      backward_by_class(p, n, logits, y, out, s);
    });
  } else {
    ByParticle<accumulator_t<T>> s(scratch, p.K, p.C);
    each([&](int64_t n, const T* logits, int64_t y, T* out) {
      backward_by_particle(p, n, logits, y, out, begin, end, s);
    });
  }
  if (p.stream) finish_streaming();
}

int64_t backward_scratch(int64_t K, int64_t C) {
  Scratch scratch{nullptr};
  if (K >= C) {
    ByClass(scratch, K, C);
  } else {
    ByParticle<double>(scratch, K, C);
  }
  return scratch.used;
}

}  // namespace

extern const VolumeBackwardKernels volume_backward_kernels = {
    backward_scratch, {backward<float>, backward<double>, backward<f16>, backward<bf16>}};

}  // namespace multilora::MULTILORA_LEVEL
