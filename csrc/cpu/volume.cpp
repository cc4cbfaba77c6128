// gram_volume and particle_loss on the CPU: what is done by which thread.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "bind.h"
#include "volume_kernels.h"

namespace py = pybind11;

namespace multilora {
namespace {

// Memory that a thread keeps between calls: fresh pages cost more than a small operator. Null where
// there is none left.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t size = 0;
  if (size < bytes) {
    int64_t pages = (bytes + 4095) / 4096 * 4096;
    // What there was is given back first.
    size = 0;
    memory.reset();
    memory.reset(std::aligned_alloc(4096, size_t(pages)));
    if (memory) size = pages;
  }
  return memory.get();
}

// run(task, scratch memory) for all tasks. An exception must not leave a parallel region, or the
// process ends.
template <class Run>
void share_out(int64_t tasks, int threads, int64_t bytes, Run run) {
  std::atomic<bool> starved{false};
  auto try_run = [&](int64_t task) {
    void* memory = scratch(bytes);
    if (memory) {
      run(task, memory);
    } else {
      starved = true;
    }
  };
  if (threads == 1) {
    for (int64_t task = 0; task < tasks && !starved; ++task) try_run(task);
  } else {
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) try_run(task);
  }
  if (starved) throw std::bad_alloc();
}

// Threads for so many numbers: waking them takes longer than 16 thousand of them.
int useful(int threads, int64_t numbers) { return numbers < 16384 ? 1 : threads; }

// The place of the first target outside [0, C), or −1.
int64_t first_wrong(const int64_t* targets, int64_t stride, int64_t N, int64_t C) {
  for (int64_t n = 0; n < N; ++n) {
    int64_t y = targets[n * stride];
    if (uint64_t(y) >= uint64_t(C) && y != kIgnored) return n;
  }
  return -1;
}

// Σ over the blocks in their order, divided by the number of valid targets.
template <class A>
void write_means(const VolumeForward& p, const std::vector<double>& sums, void* nll,
                 void* divergence, void* count) {
  int64_t valid = 0, numbers = p.K + 1;
  for (int64_t n = 0; n < p.N; ++n) valid += p.targets[n * p.stride_target] != kIgnored;
  double divisor = double(std::max<int64_t>(valid, 1));
  for (int64_t i = 0; i < numbers; ++i) {
    double total = 0;
    for (size_t block = i; block < sums.size(); block += size_t(numbers)) total += sums[block];
    *(i < p.K ? static_cast<A*>(nll) + i : static_cast<A*>(divergence)) = A(total / divisor);
  }
  *static_cast<A*>(count) = A(divisor);
}

// Every address is that of a tensor's first number; value, or nll, divergence and count, may be 0.
// -> the place of the first target that is out of range, and nothing is written, or −1.
int64_t volume_forward(uintptr_t logits, uintptr_t targets, uintptr_t value, uintptr_t stats,
                       uintptr_t core, uintptr_t nll, uintptr_t divergence, uintptr_t count,
                       int dtype, int64_t stride_k, int64_t stride_n, int64_t stride_target,
                       int64_t K, int64_t N, int64_t C, double eps, int kind, int threads) {
  VolumeForward p{reinterpret_cast<const void*>(logits),
                  reinterpret_cast<const int64_t*>(targets),
                  reinterpret_cast<void*>(value),
                  reinterpret_cast<void*>(stats),
                  reinterpret_cast<void*>(core),
                  stride_k, stride_n, stride_target, K, N, C, eps, VolumeKind(kind), false};
  int64_t wrong = first_wrong(p.targets, stride_target, N, C);
  if (wrong >= 0) return wrong;
  const VolumeForwardKernels& kernels = MULTILORA_PICK(volume_forward_kernels);
  // A block of fewer examples where one is much work, so that all threads have some.
  int64_t block = std::clamp<int64_t>(16384 / (K * C), 1, kernels.examples);
  // Not where most lanes would be empty, or the matrices of all of them fill the second-level
  // cache.
  p.in_lanes = block >= std::min(kernels.examples, 4) && std::min(K, C) <= 64;
  int64_t blocks = (N + block - 1) / block, bytes = kernels.scratch(K, C);
  std::vector<double> sums(nll ? size_t(blocks * (K + 1)) : 0);
  threads = useful(threads, N * K * (C + 4 * std::min(K, C)));
  share_out(blocks, threads, bytes, [&](int64_t b, void* memory) {
    int examples = int(std::min(block, N - b * block));
    double* own = nll ? sums.data() + b * (K + 1) : nullptr;
    kernels.run[dtype](p, b * block, examples, own, memory);
  });
  if (nll) {
    auto write = DType(dtype) == DType::f64 ? write_means<double> : write_means<float>;
    write(p, sums, reinterpret_cast<void*>(nll), reinterpret_cast<void*>(divergence),
          reinterpret_cast<void*>(count));
  }
  return -1;
}

// Numbers of a gradient that is written past the caches. 8.2 million of float32 take a quarter less
// time so (K 4, N 64, C 32000, one thread of Zen 4, out kept); halves gain nothing and are not.
constexpr int64_t kStreamed = 2 << 20;

// grad_nll and count are 0 for gram_volume.
void volume_backward(uintptr_t grad, uintptr_t grad_nll, uintptr_t count, uintptr_t logits,
                     uintptr_t targets, uintptr_t stats, uintptr_t core, uintptr_t out, int dtype,
                     int64_t stride_grad, int64_t stride_nll, int64_t stride_k, int64_t stride_n,
                     int64_t stride_target, int64_t K, int64_t N, int64_t C, int threads) {
  VolumeBackward p{reinterpret_cast<const void*>(grad),
                   reinterpret_cast<const void*>(grad_nll),
                   reinterpret_cast<const void*>(count),
                   reinterpret_cast<const void*>(logits),
                   reinterpret_cast<const int64_t*>(targets),
                   reinterpret_cast<const void*>(stats),
                   reinterpret_cast<const void*>(core),
                   reinterpret_cast<void*>(out),
                   stride_grad, stride_nll, stride_k, stride_n, stride_target, K, N, C, false};
  const VolumeBackwardKernels& kernels = MULTILORA_PICK(volume_backward_kernels);
  p.stream = K < C && K * N * C >= kStreamed && C % 64 == 0 && out % 64 == 0;
  // About 64 thousand numbers: several examples, or, in whole vectors, a part of the classes of
  // one.
  constexpr int64_t kPart = 65536;
  int64_t examples = std::max<int64_t>(1, std::min(kPart / (K * C), N / 16));
  int64_t classes = K < C ? std::max<int64_t>(64, kPart / K / 64 * 64) : C;
  int64_t parts = (C + classes - 1) / classes, groups = (N + examples - 1) / examples;
  int64_t bytes = kernels.scratch(K, C);
  threads = useful(threads, N * K * (C + std::min(K, C)));
  share_out(groups * parts, threads, bytes, [&](int64_t task, void* memory) {
    int64_t first = task / parts * examples, begin = task % parts * classes;
    kernels.run[dtype](p, first, std::min(first + examples, N), begin,
                       std::min(begin + classes, C), memory);
  });
}

}  // namespace

void bind_volume(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("volume_forward", &volume_forward, release());
  m.def("volume_backward", &volume_backward, release());
}

}  // namespace multilora
