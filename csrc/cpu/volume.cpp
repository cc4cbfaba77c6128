// gram_volume and particle_loss on the CPU: how the work is divided between threads.
#include <algorithm>
#include <vector>

#include "share_out.h"
#include "volume_kernels.h"

namespace multilora {
namespace {

// The number of threads worth using: waking them takes longer than processing 16 thousand numbers.
int useful(int threads, int64_t numbers) { return numbers < 16384 ? 1 : threads; }

// The index of the first target outside [0, C), or −1.
int64_t first_wrong(const int64_t* targets, int64_t stride, int64_t N, int64_t C) {
  for (int64_t n = 0; n < N; ++n) {
    int64_t y = targets[n * stride];
    if (uint64_t(y) >= uint64_t(C) && y != kIgnored) return n;
  }
  return -1;
}

// Adds up the blocks' sums in their order and divides by the number of valid targets.
template <class A>
void write_means(const CpuVolumeForward& p, const std::vector<double>& sums,
                 const VolumeMeans& means) {
  int64_t valid = 0, numbers = p.K + 1;
  for (int64_t n = 0; n < p.N; ++n) valid += p.targets[n * p.stride_target] != kIgnored;
  double divisor = double(std::max<int64_t>(valid, 1));
  for (int64_t i = 0; i < numbers; ++i) {
    double total = 0;
    for (size_t block = i; block < sums.size(); block += size_t(numbers)) total += sums[block];
    *(i < p.K ? static_cast<A*>(means.nll) + i : static_cast<A*>(means.divergence)) =
        A(total / divisor);
  }
  *static_cast<A*>(means.count) = A(divisor);
}

// The size from which a gradient is written past the caches. 8.2 million float32 numbers then take
// a quarter less time (K 4, N 64, C 32000, one thread of Zen 4, out kept). Half precision gains
// nothing and is written normally.
constexpr int64_t kStreamed = 2 << 20;

}  // namespace

int64_t volume_forward(CpuVolumeForward p, const VolumeMeans& means, DType dtype, int threads) {
  int64_t K = p.K, N = p.N, C = p.C;
  int64_t wrong = first_wrong(p.targets, p.stride_target, N, C);
  if (wrong >= 0) return wrong;
  const VolumeForwardKernels& kernels = MULTILORA_PICK(volume_forward_kernels);
  // Blocks are smaller where an example is much work, so that all threads have some.
  int64_t block = std::clamp<int64_t>(16384 / (K * C), 1, kernels.examples);
  // One example per lane does not pay where most lanes would be empty, or where the matrices of all
  // lanes fill the second-level cache.
  p.in_lanes = block >= std::min(kernels.examples, 4) && std::min(K, C) <= 64;
  int64_t blocks = ceil_div(N, block), bytes = kernels.scratch(K, C);
  std::vector<double> sums(means.nll ? size_t(blocks * (K + 1)) : 0);
  threads = useful(threads, N * K * (C + 4 * std::min(K, C)));
  share_out(blocks, threads, bytes, [&](int64_t b, void* memory) {
    int examples = int(std::min(block, N - b * block));
    double* own = means.nll ? sums.data() + b * (K + 1) : nullptr;
    kernels.run[int(dtype)](p, b * block, examples, own, memory);
  });
  if (means.nll) {
    auto write = dtype == DType::f64 ? write_means<double> : write_means<float>;
    write(p, sums, means);
  }
  return -1;
}

void volume_backward(CpuVolumeBackward p, DType dtype, int threads) {
  int64_t K = p.K, N = p.N, C = p.C;
  const VolumeBackwardKernels& kernels = MULTILORA_PICK(volume_backward_kernels);
  p.stream = K < C && K * N * C >= kStreamed && C % 64 == 0 &&
             reinterpret_cast<uintptr_t>(p.out) % 64 == 0;
  // A task has about 64 thousand numbers: several examples, or some of one example's classes, in
  // whole vectors.
  constexpr int64_t kPart = 65536;
  int64_t examples = std::max<int64_t>(1, std::min(kPart / (K * C), N / 16));
  int64_t classes = K < C ? std::max<int64_t>(64, kPart / K / 64 * 64) : C;
  int64_t parts = ceil_div(C, classes), groups = ceil_div(N, examples);
  int64_t bytes = kernels.scratch(K, C);
  threads = useful(threads, N * K * (C + std::min(K, C)));
  share_out(groups * parts, threads, bytes, [&](int64_t task, void* memory) {
    int64_t first = task / parts * examples, begin = task % parts * classes;
    kernels.run[int(dtype)](p, first, std::min(first + examples, N), begin,
                            std::min(begin + classes, C), memory);
  });
}

}  // namespace multilora
