// The kernels of adapter geometry that exist once for each level of the CPU.
#pragma once

#include "../geometry.h"
#include "levels.h"

namespace multilora {

// The side of a Gram matrix in memory. What is added to it is zero.
MULTILORA_HD int64_t gram_side(int particles, int rank) {
  return ceil_div(int64_t(particles) * rank, 8) * 8;
}

// How many features are worked on at a time, so that they stay in the caches: a multiple of 48, the
// width of a tile of three AVX-512 vectors of float32.
MULTILORA_HD int64_t panel_features(int64_t side) {
  int64_t features = 6144 / side / 48 * 48;
  return features < 48 ? 48 : features > 240 ? 240 : features;
}

// The numbers that a worker needs for itself.
MULTILORA_HD int64_t scratch_size(int64_t side) {
  int64_t panels = 3 * side * panel_features(side);
  return panels < side * side ? side * side : panels;
}

struct GeometryKernels {
  // One part of a Gram matrix, over the features [first, last): its upper triangle.
  void (*gram)(const Adapters&, const Layer&, int factor, int64_t first, int64_t last, double* gram,
               double* scratch);
  // The whole matrix of its parts, in place of the first.
  void (*gather)(double* parts, int64_t count, int64_t side);
  void (*trace)(const Adapters&, const Layer&, const Gram& gram_A, const Gram& gram_B,
                double* scratch);
  // What a factor's gradient is a product with, in its dtype or float32, out of the other factor's
  // Gram matrix, and the particles' norms (K,) out of its own.
  void (*weigh)(const Adapters&, const Layer&, const Gram& gram, const Gram& own, void* weight,
                double* norms, double* scratch);
  // The features [first, last) of the factor's gradient.
  void (*apply)(const Adapters&, const Layer&, int factor, int64_t first, int64_t last,
                const void* weight, const double* norms, double* scratch);
};

MULTILORA_EACH_LEVEL(extern const GeometryKernels geometry_kernels)

}  // namespace multilora
