// The maths of the adapters' geometry that the CPU and the GPU share: everything that follows the
// Gram matrices G_A = A_cat A_catᵀ and G_B = B_catᵀ B_cat of a layer, A_cat (K·r, d_in) and
// B_cat (d_out, K·r) being the factors of all particles stacked. All of it is in float64.
#pragma once

#include "common.h"

namespace multilora {

// One factor of one layer: lora_A (K, r, d) or lora_B (K, d, r), contiguous.
struct Factor {
  const void* x;
  const void* grad;  // SVGD's gradient of the factor; null: there is none
  void* out;         // the gradient or the direction that is to be written
  int64_t d;
  bool is_B;
};

struct Layer {
  Factor factors[2];
  int rank;
  double scaling;
  const double* upstream;  // ∂L/∂T (K, K)
  const double* mix;       // (K, K) or, as a diagonal, (K,); null without gradients
  void* traces;            // T or D (K, K), float64 for float64 factors; null for gradients
};

// What holds for all layers.
struct Adapters {
  DType dtype;
  int particles;
  bool distance;     // whether `traces` is D
  bool mix_is_full;  // (K, K)
};

// A Gram matrix in parts, each (side, side) and the sum over a stretch of the features.
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
    // Not a division, which would take longer than the rest.
    for (; b >= rank; b -= rank) ++a;
    if (a >= rank) break;
    int64_t row = int64_t(i) * rank + a, col = int64_t(j) * rank + b;
    total += gram_A.at(row, col) * gram_B.at(row, col);
  }
  return group.sum(total);
}

// ‖ΔW_i − ΔW_j‖² of T_ii, T_jj and T_ij. The rounding of float64 may leave it below zero.
MULTILORA_HD double distance(double T_ii, double T_jj, double T_ij) {
  double value = T_ii + T_jj - 2 * T_ij;
  // Not a maximum, which would hide a NaN.
  return value < 0 ? 0 : value;
}

// U_ij = s² (∂L/∂T_ij + ∂L/∂T_ji), of one layer's ∂L/∂T (K, K): the factors' gradients are
// dA_cat = ((U ⊗ 1) ∘ G_B) A_cat and dB_cat = B_cat ((U ⊗ 1) ∘ G_A).
MULTILORA_HD double pull(const double* grad, int particles, double scaling, int i, int j) {
  double both = grad[int64_t(i) * particles + j] + grad[int64_t(j) * particles + i];
  return scaling * scaling * both;
}

}  // namespace multilora
