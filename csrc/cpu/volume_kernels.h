// What volume.cpp asks of the files that are compiled for every level.
#pragma once

#include "../volume.h"
#include "levels.h"

namespace multilora {

// logits (K, N, C) with dense classes, targets (N,); strides in elements. Numbers and gradients are
// of the logits' dtype, or float32 where that is a half precision; core is float64 where K >= C.
struct VolumeForward {
  const void* logits;
  const int64_t* targets;
  void* value;  // (N,), or null
  void* stats;  // (3, K, N)
  void* core;   // (N, m, m), m = min(K, C)
  int64_t stride_k, stride_n, stride_target, K, N, C;
  double eps;
  VolumeKind kind;
  // Whether the matrices are worked on with an example in every lane, or one after another.
  bool in_lanes;
};

struct VolumeBackward {
  const void* grad;      // (N,) of gram_volume, () of the divergence
  const void* grad_nll;  // (K,), null of gram_volume
  const void* count;     // (), null of gram_volume
  const void* logits;
  const int64_t* targets;
  const void* stats;
  const void* core;
  void* out;  // (K, N, C), contiguous
  int64_t stride_grad, stride_nll, stride_k, stride_n, stride_target, K, N, C;
  // Whether to write numbers of 4 or 8 bytes past the caches: all rows are whole, aligned vectors.
  bool stream;
};

// Scratch memory is in bytes, aligned to a vector; the functions are by DType.
struct VolumeForwardKernels {
  // As many as `run` takes at once.
  int examples;
  int64_t (*scratch)(int64_t K, int64_t C);
  // `sums` (K + 1): of −log p_y and of the values over the valid examples, or null.
  void (*run[4])(const VolumeForward&, int64_t first, int count, double* sums, void* scratch);
};

struct VolumeBackwardKernels {
  int64_t (*scratch)(int64_t K, int64_t C);
  // The classes [begin, end) of the examples [first, last); begin is a multiple of 64.
  void (*run[4])(const VolumeBackward&, int64_t first, int64_t last, int64_t begin, int64_t end,
                 void* scratch);
};

MULTILORA_EACH_LEVEL(extern const VolumeForwardKernels volume_forward_kernels)
MULTILORA_EACH_LEVEL(extern const VolumeBackwardKernels volume_backward_kernels)

}  // namespace multilora
