// The low-rank part of a LoRA linear on the CPU, for particles that have different numbers of rows.
#pragma once

#include <vector>

#include "../common.h"

namespace multilora {

// The rows [first, last) belong to a particle, whose adapter has this rank and scaling.
struct Part {
  int64_t particle, first, last, rank;
  double scaling;
};

// Contiguous but for x, whose rows are stride_x apart. r is the largest rank.
struct LowRank {
  const void* x;       // (T, d_in)
  const void* lora_A;  // (K, r, d_in)
  const void* lora_B;  // (K, d_out, r)
  const void* start;   // (T, d_out), y itself; or (d_out,), for every row; or null for zeros
  void* y;             // (T, d_out)
  void* shrunk;        // (T, r), or null
  int64_t rows, d_in, d_out, rank, stride_x;
};

// y_t = start_t + s_k B_k A_k x_t, in float32 or float64, for the rows t of each part, and start_t
// for the others; shrunk gets A_k x_t. The parts are in the order of their rows. What lies behind a
// part's rank is neither read nor written.
void low_rank(const LowRank& p, const std::vector<Part>& parts, DType dtype, int threads);

}  // namespace multilora
