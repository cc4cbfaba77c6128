// The interface between volume.cpp and the kernels that are compiled for every level.
#pragma once

#include "levels.h"
#include "volume.h"

namespace multilora {

// Scratch memory is in bytes, aligned to a vector; `run` is indexed by DType.
struct VolumeForwardKernels {
  // The most examples that one call of `run` takes.
  int examples;
  int64_t (*scratch)(int64_t K, int64_t C);
  // `sums` (K + 1), or null: the sums of −log p_y and of the values over the valid examples.
  void (*run[4])(const CpuVolumeForward&, int64_t first, int count, double* sums, void* scratch);
};

struct VolumeBackwardKernels {
  int64_t (*scratch)(int64_t K, int64_t C);
  // Does the classes [begin, end) of the examples [first, last); begin is a multiple of 64.
  void (*run[4])(const CpuVolumeBackward&, int64_t first, int64_t last, int64_t begin, int64_t end,
                 void* scratch);
};

MULTILORA_EACH_LEVEL(extern const VolumeForwardKernels volume_forward_kernels)
MULTILORA_EACH_LEVEL(extern const VolumeBackwardKernels volume_backward_kernels)

}  // namespace multilora
