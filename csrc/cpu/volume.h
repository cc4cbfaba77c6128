// gram_volume and particle_loss on the CPU: the functions that the bindings call.
#pragma once

#include "../volume.h"

namespace multilora {

// logits (K, N, C) with dense classes, targets (N,); strides in elements. Numbers and gradients are
// of the logits' dtype, or float32 where that is a half precision; core is float64 where K >= C.
struct CpuVolumeForward {
  const void* logits;
  const int64_t* targets;
  void* value;  // (N,), or null
  void* stats;  // (3, K, N)
  void* core;   // (N, m, m), m = min(K, C)
  int64_t stride_k, stride_n, stride_target, K, N, C;
  double eps;
  VolumeKind kind;
  // Whether each lane holds another example's matrix; if not, the matrices come one after another.
  bool in_lanes;
};

// Where the means over the valid targets go; all null for gram_volume.
struct VolumeMeans {
  void* nll;         // (K,)
  void* divergence;  // ()
  void* count;       // ()
};

struct CpuVolumeBackward {
  const void* grad;      // (N,) for gram_volume, () for particle_loss's divergence
  const void* grad_nll;  // (K,); null for gram_volume
  const void* count;     // (); null for gram_volume
  const void* logits;
  const int64_t* targets;
  const void* stats;
  const void* core;
  void* out;  // (K, N, C), contiguous
  int64_t stride_grad, stride_nll, stride_k, stride_n, stride_target, K, N, C;
  // Whether to write 4- or 8-byte numbers past the caches, where all rows are whole, aligned
  // vectors.
  bool stream;
};

// Returns −1; or, without writing anything, the index of the first target that is out of range.
int64_t volume_forward(CpuVolumeForward p, const VolumeMeans& means, DType dtype, int threads);
void volume_backward(CpuVolumeBackward p, DType dtype, int threads);

}  // namespace multilora
