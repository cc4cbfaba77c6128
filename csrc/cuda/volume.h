// gram_volume and particle_loss on the GPU: the functions that the bindings call.
#pragma once

#include "../volume.h"
#include "stream.h"

namespace multilora {

// logits (K, N, C) with dense classes, targets (N,); strides in elements. Numbers and gradients are
// of the logits' dtype, or float32 where that is a half precision; core is float64 where K >= C.
struct CudaVolumeForward {
  const void* logits;
  const int64_t* targets;
  double* parts;  // workspace of volume_parts() doubles
  void* value;    // (N,)
  void* losses;   // (K, N): −log p_y; null for gram_volume
  void* stats;    // (3, K, N)
  void* core;     // (N, m, m), m = min(K, C)
  int64_t stride_k, stride_n, stride_target, N, C;
  int K;
  double eps, log_eps;
  VolumeKind kind;
  // The launch chooses these.
  int splits, lanes;
  bool aligned;
};

struct CudaVolumeBackward {
  const void* grad;      // (N,) for gram_volume, () for particle_loss's divergence
  const void* grad_nll;  // (K,); null for gram_volume
  const void* count;     // (); null for gram_volume
  const void* logits;
  const int64_t* targets;
  const void* stats;
  const void* core;
  void* out;  // (K, N, C), contiguous
  int64_t stride_grad, stride_nll, stride_k, stride_n, stride_target, N, C;
  int K;
  int splits, lanes;
  bool aligned;
};

constexpr int kMostParticles = 32;

// The doubles that a forward pass needs as workspace.
int64_t volume_parts(int K, int64_t N, int64_t C, DType dtype);
// Makes two launches.
void volume_forward(CudaVolumeForward p, DType dtype, Stream stream);
// Writes the means of `rows` (K + 1, N), which are the losses and values of a forward pass, over
// the valid targets to nll (K,) and divergence (), and the number of these targets to count ().
void volume_means(const void* rows, const int64_t* targets, int64_t stride_target, void* nll,
                  void* divergence, void* count, int K, int64_t N, DType dtype, Stream stream);
// Makes one launch.
void volume_backward(CudaVolumeBackward p, DType dtype, Stream stream);

}  // namespace multilora
