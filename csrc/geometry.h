// The maths of the adapters' geometry that the CPU and the GPU share: everything that is computed
// from a layer's Gram matrices G_A = A_cat A_catᵀ and G_B = B_catᵀ B_cat, where A_cat (K·r, d_in)
// and B_cat (d_out, K·r) are the stacked factors of all particles. It is all in float64.
#pragma once

#include "common.h"

namespace multilora {

// One factor of one layer: lora_A (K, r, d) or lora_B (K, d, r), contiguous.
struct Factor {
  const void* x;
  const void* grad;  // SVGD's gradient of the factor, or null
  void* out;         // the gradient or the direction to be written
  int64_t d;
  bool is_B;
};

struct Layer {
  Factor factors[2];
  int rank;
  double scaling;
  const double* upstream;  // ∂L/∂T (K, K)
  const double* mix;       // (K, K), or a diagonal (K,); null where there are no gradients to mix
  void* traces;            // T or D (K, K), float64 for float64 factors; null in a backward pass
};

// The parameters that all layers share.
struct Adapters {
  DType dtype;
  int particles;
  bool distance;     // `traces` is D rather than T
  bool mix_is_full;  // `mix` is (K, K) rather than (K,)
};

// A Gram matrix (side, side) in parts: each part is the sum over a range of the features.
struct Gram {
  const double* parts;
  int count;
  int64_t side;

  MULTILORA_HD double at(int64_t row, int64_t col) const {
    const double* place = parts + row * side + col;
    double total = *place;
    for (int part = 1; part < count; ++part) total += place[part * side * side];
    return total;
  }
};

// ⟨B_i A_i, B_j A_j⟩ = Σ_ab G_A[i·r + a, j·r + b] G_B[i·r + a, j·r + b].
template <class Group>
MULTILORA_HD double trace(const Group& group, const Gram& gram_A, const Gram& gram_B, int rank,
                          int i, int j) {
  double total = 0;
  for (int a = 0, b = group.rank(); a < rank; b += group.size()) {
    // A division would take longer than the rest of the loop.
    for (; b >= rank; b -= rank) ++a;
    if (a >= rank) break;
    int64_t row = int64_t(i) * rank + a, col = int64_t(j) * rank + b;
    total += gram_A.at(row, col) * gram_B.at(row, col);
  }
  return group.sum(total);
}

// ‖ΔW_i − ΔW_j‖² from T_ii, T_jj and T_ij. Rounding may leave the sum slightly below zero.
MULTILORA_HD double distance(double T_ii, double T_jj, double T_ij) {
  double value = T_ii + T_jj - 2 * T_ij;
  // max(0, value) would hide a NaN.
  return value < 0 ? 0 : value;
}

// U_ij = s² (∂L/∂T_ij + ∂L/∂T_ji), where `grad` is one layer's ∂L/∂T (K, K). The factors' gradients
// are dA_cat = ((U ⊗ 1) ∘ G_B) A_cat and dB_cat = B_cat ((U ⊗ 1) ∘ G_A).
MULTILORA_HD double pull(const double* grad, int particles, double scaling, int i, int j) {
  double both = grad[int64_t(i) * particles + j] + grad[int64_t(j) * particles + i];
  return scaling * scaling * both;
}

}  // namespace multilora
