// The kernels of adapter geometry, which exist once per level of the CPU.
#pragma once

#include "../geometry.h"
#include "levels.h"

namespace multilora {

// The side of a Gram matrix in memory: K·r, padded with zeros.
MULTILORA_HD int64_t gram_side(int particles, int rank) {
  return ceil_div(int64_t(particles) * rank, 8) * 8;
}

// The features processed at a time, few enough to stay in the caches: a multiple of 48, the width
// of a tile of three AVX-512 vectors of float32.
MULTILORA_HD int64_t panel_features(int64_t side) {
  int64_t features = 6144 / side / 48 * 48;
  return features < 48 ? 48 : features > 240 ? 240 : features;
}

// The doubles that a thread needs for itself.
MULTILORA_HD int64_t scratch_size(int64_t side) {
  int64_t panels = 3 * side * panel_features(side);
  return panels < side * side ? side * side : panels;
}

struct GeometryKernels {
  // Computes the upper triangle of one part of a Gram matrix, over the features [first, last).
  void (*gram)(const Adapters&, const Layer&, int factor, int64_t first, int64_t last, double* gram,
               double* scratch);
  // Adds up the parts of a Gram matrix into the first one, and fills both triangles.
  void (*gather)(double* parts, int64_t count, int64_t side);
  void (*trace)(const Adapters&, const Layer&, const Gram& gram_A, const Gram& gram_B,
                double* scratch);
  // Computes the matrix by which a factor's gradient is multiplied, in its dtype or float32, from
  // the other factor's Gram matrix, and the particles' norms (K,) from the factor's own.
  void (*weigh)(const Adapters&, const Layer&, const Gram& gram, const Gram& own, void* weight,
                double* norms, double* scratch);
  // Computes the features [first, last) of the factor's gradient.
  void (*apply)(const Adapters&, const Layer&, int factor, int64_t first, int64_t last,
                const void* weight, const double* norms, double* scratch);
};

MULTILORA_EACH_LEVEL(extern const GeometryKernels geometry_kernels)

}  // namespace multilora
