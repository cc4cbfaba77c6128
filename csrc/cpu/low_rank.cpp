// The low-rank part of a LoRA linear on the CPU: how the work is divided between threads.
#include "low_rank.h"

#include <algorithm>

#include "low_rank_kernels.h"
#include "share_out.h"

namespace multilora {
namespace {

// Waking another thread takes longer than this number of multiplications.
constexpr int64_t kTiny = 1 << 16;

struct Task {
  Part part;
  int64_t first, last;
};

}  // namespace

void low_rank(const LowRank& p, const std::vector<Part>& parts, DType dtype, int threads) {
  int64_t products = 0, rows = 0, done = 0;
  int64_t rank = 1;  // the largest, but for scratch memory, of which there is always some
  for (const Part& part : parts) {
    rows += part.last - part.first;
    products += (part.last - part.first) * part.rank * (p.d_in + p.d_out);
    rank = std::max(rank, part.rank);
  }
  threads = int(std::clamp<int64_t>(products / kTiny, 1, threads));
  // Every task turns its particle's B, so tasks have many rows, and every thread has some.
  int64_t most = std::clamp<int64_t>(ceil_div(rows, 2 * threads), 8, kMostRows);
  std::vector<Task> tasks;
  auto split = [&](const Part& part) {
    for (int64_t first = part.first; first < part.last; first += most) {
      tasks.push_back({part, first, std::min(first + most, part.last)});
    }
  };
  // Rows of no part have the rank 0; there is nothing to do where they are what they start from.
  for (const Part& part : parts) {
    if (p.start != p.y) split({0, done, part.first, 0, 0});
    split(part);
    done = part.last;
  }
  if (p.start != p.y) split({0, done, p.rows, 0, 0});
  const LowRankKernels& kernels = MULTILORA_PICK(low_rank_kernels);
  auto run = dtype == DType::f64 ? kernels.run_f64 : kernels.run_f32;
  share_out(int64_t(tasks.size()), threads, kernels.scratch(rank), [&](int64_t at, void* memory) {
    const Task& task = tasks[size_t(at)];
    run(p, task.part, task.first, task.last, memory);
  });
}

}  // namespace multilora
