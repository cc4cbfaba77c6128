// The interface between low_rank.cpp and the kernels that are compiled for every level.
#pragma once

#include "levels.h"
#include "low_rank.h"

namespace multilora {

// The most rows that one call takes.
constexpr int64_t kMostRows = 64;

struct LowRankKernels {
  // The bytes that a call needs, aligned to a vector.
  int64_t (*scratch)(int64_t rank);
  // Computes the rows [first, last) of a part.
  void (*run_f32)(const LowRank&, const Part&, int64_t first, int64_t last, void* scratch);
  void (*run_f64)(const LowRank&, const Part&, int64_t first, int64_t last, void* scratch);
};

MULTILORA_EACH_LEVEL(extern const LowRankKernels low_rank_kernels)

}  // namespace multilora
