// gram_volume and particle_loss on the CPU, backward, for one level: chunks of f̃ stay in the
// first-level cache.
#include "volume_chunks.h"
#include "volume_kernels.h"

namespace multilora::MULTILORA_LEVEL {
namespace {

template <int number>
struct Number {
  static constexpr int value = number;
};

// Per particle, in whole vectors.
template <class A>
struct Particles {
  Vec<A>*weight, *top, *norm, *rest, *own, *offset, *on_target;

  Particles(Scratch& scratch, int64_t K) {
    Vec<A>** arrays[] = {&weight, &top, &norm, &rest, &own, &offset, &on_target};
    int64_t vectors = up(K, Vec<A>::lanes);
    for (Vec<A>** array : arrays) *array = scratch.take<Vec<A>>(vectors);
    for (int64_t m = 0; scratch.memory && m < vectors; ++m) {
      weight[m] = top[m] = own[m] = Vec<A>(A(0));
      norm[m] = rest[m] = Vec<A>(A(1));
    }
  }
};

// Offsets, gradients on the target and 1/‖e‖ (in norm) of example n.
template <class T>
void weigh_particles(const VolumeBackward& p, int64_t n, const T* logits, int64_t y,
                     const Particles<accumulator_t<T>>& all) {
  using A = accumulator_t<T>;
  const A* stats = static_cast<const A*>(p.stats) + n;
  const A* grad_nll = static_cast<const A*>(p.grad_nll);
  A count = grad_nll ? *static_cast<const A*>(p.count) : A(1);
  auto set = [](Vec<A>* array, int64_t i, A number) { reinterpret_cast<A*>(array)[i] = number; };
  int64_t vectors = up(p.K, Vec<A>::lanes);
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

// f̃ of a chunk, zero on the target and in padding.
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

// The gradients of a chunk for `rows` particles from i on, K < C.
template <int rows, class T, class A>
void write_rows(T* out, int64_t next, int64_t count, int64_t K, int64_t i, const A* core,
                const A* offset, const Chunk<A>& chunk, bool stream) {
  constexpr int lanes = Vec<A>::lanes;
  for (int64_t m = 0; m < up(count, lanes); ++m) {
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

// The gradients of all classes for particle i, K >= C: core is over the classes, `next` apart.
template <class T, class A>
void write_by_class(T* out, int64_t C, int64_t i, const A* core, int64_t next, A offset,
                    Vec<A>* x, const Chunk<A>& chunk) {
  constexpr int lanes = Vec<A>::lanes;
  const Vec<A>* f = chunk.e + i * chunk.vectors;
  const A* numbers = reinterpret_cast<const A*>(f);
  Vec<A> along(A(0));
  for (int64_t m = 0; m < chunk.vectors; ++m) {
    x[m] = Vec<A>(A(0));
    for (int64_t c = 0; c < C; ++c) {
      x[m] += Vec<A>(numbers[c]) * load_vector(core + c * next + m * lanes);
    }
    along += x[m] * f[m];
  }
  Vec<A> total(sum(along)), shift(offset);
  for (int64_t m = 0; m < chunk.vectors; ++m) {
    Vec<A> dz = (x[m] - total * f[m] + shift) * f[m];
    store_vector(out + m * lanes, dz, int(least(lanes, C - m * lanes)));
  }
}

// What a backward pass keeps for an example.
template <class A>
struct Backward {
  Chunk<A> chunk;
  Particles<A> particles;
  int64_t side, next;
  A* core;    // (side, next), times twice the upstream gradient; zeros in padding
  Vec<A>* x;  // (vectors of the chunk)

  Backward(Scratch& scratch, int64_t K, int64_t C)
      : chunk(scratch, K, C),
        particles(scratch, K),
        side(least(K, C)),
        next(K < C ? K : chunk.vectors * Vec<A>::lanes),
        core(scratch.take<A>(side * next)),
        x(scratch.take<Vec<A>>(chunk.vectors)) {}
};

template <class T>
void backward(const VolumeBackward& p, int64_t first, int64_t last, int64_t begin, int64_t end,
              void* memory) {
  using A = accumulator_t<T>;
  constexpr int lanes = Vec<A>::lanes;
  Scratch scratch{static_cast<char*>(memory)};
  Backward<A> s(scratch, p.K, p.C);
  const A* offset = reinterpret_cast<const A*>(s.particles.offset);
  int64_t size = p.N * p.C;
  for (int64_t n = first; n < last; ++n) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.stride_n;
    T* out = static_cast<T*>(p.out) + n * p.C;
    int64_t y = p.targets[n * p.stride_target];
    if (y == kIgnored) {
      for (int64_t i = 0; i < p.K; ++i) {
        memset(out + i * size + begin, 0, size_t(end - begin) * sizeof(T));
      }
      continue;
    }
    weigh_particles(p, n, logits, y, s.particles);
    const A* core = static_cast<const A*>(p.core) + n * s.side * s.side;
    A slope = static_cast<const A*>(p.grad)[n * p.stride_grad];
    if (p.grad_nll) slope /= *static_cast<const A*>(p.count);
    slope *= 2;
    for (int64_t i = 0; i < s.side; ++i) {
      for (int64_t j = 0; j < s.next; ++j) {
        s.core[i * s.next + j] = j < s.side ? core[i * s.side + j] * slope : A(0);
      }
    }
    for (int64_t start = begin; start < end; start += s.chunk.vectors * lanes) {
      int64_t count = least(s.chunk.vectors * lanes, end - start);
      normalised(logits + start, p.stride_k, count, y - start, p.K, s.particles, s.chunk);
      T* here = out + start;
      if (p.K >= p.C) {
        for (int64_t i = 0; i < p.K; ++i) {
          write_by_class(here + i * size, p.C, i, s.core, s.next, offset[i], s.x, s.chunk);
        }
        continue;
      }
      for (int64_t i = 0; i < p.K; i += 4) {
        auto rows = [&](auto number) {
          write_rows<decltype(number)::value>(here, size, count, p.K, i, s.core, offset, s.chunk,
                                              p.stream);
        };
        switch (least(p.K - i, 4)) {
          case 4: rows(Number<4>()); break;
          case 3: rows(Number<3>()); break;
          case 2: rows(Number<2>()); break;
          default: rows(Number<1>());
        }
      }
    }
    if (y >= begin && y < end) {
      for (int64_t i = 0; i < p.K; ++i) {
        store(out + i * size + y, reinterpret_cast<const A*>(s.particles.on_target)[i]);
      }
    }
  }
  if (p.stream) finish_streaming();
}

int64_t backward_scratch(int64_t K, int64_t C) {
  Scratch scratch{nullptr};
  Backward<double>(scratch, K, C);
  return scratch.used;
}

}  // namespace

extern const VolumeBackwardKernels volume_backward_kernels = {
    backward_scratch, {backward<float>, backward<double>, backward<f16>, backward<bf16>}};

}  // namespace multilora::MULTILORA_LEVEL
