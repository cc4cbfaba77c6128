// How the bindings get the layers of adapters: as lists of numbers, the cheapest to hand over.
#pragma once

#include <vector>

#include "geometry.h"

namespace multilora {

using Addresses = std::vector<uintptr_t>;  // of all lora_A, then of all lora_B, or of their likes
using Sizes = std::vector<int64_t>;        // rank, d_in, d_out of every layer
using Scalings = std::vector<double>;

inline std::vector<Layer> layers_of(const Sizes& sizes, const Scalings& scaling,
                                    const Addresses& factors) {
  size_t count = scaling.size();
  std::vector<Layer> layers(count);
  for (size_t i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    layer.rank = int(sizes[3 * i]);
    layer.scaling = scaling[i];
    for (int which = 0; which < 2; ++which) {
      Factor& factor = layer.factors[which];
      factor.x = reinterpret_cast<const void*>(factors[which * count + i]);
      factor.d = sizes[3 * i + 1 + which];
      factor.is_B = which == 1;
    }
  }
  return layers;
}

// out: T or D of all layers (L, K, K).
inline std::vector<Layer> layers_of_traces(const Adapters& adapters, uintptr_t out,
                                           const Sizes& sizes, const Scalings& scaling,
                                           const Addresses& factors) {
  std::vector<Layer> layers = layers_of(sizes, scaling, factors);
  size_t bytes = adapters.dtype == DType::f64 ? 8 : 4;
  for (Layer& layer : layers) {
    layer.traces = reinterpret_cast<void*>(out);
    out += bytes * adapters.particles * adapters.particles;
  }
  return layers;
}

// upstream: dL/dT, float64 (L, K, K), contiguous. mix: float64 (L, K, K) or (L, K), or null, and
// then there are no grads.
inline std::vector<Layer> layers_of_gradients(const Adapters& adapters, const Addresses& outs,
                                              uintptr_t upstream, const Sizes& sizes,
                                              const Scalings& scaling, const Addresses& factors,
                                              const Addresses& grads, uintptr_t mix) {
  std::vector<Layer> layers = layers_of(sizes, scaling, factors);
  size_t count = layers.size(), square = size_t(adapters.particles) * adapters.particles;
  size_t step = adapters.mix_is_full ? square : size_t(adapters.particles);
  for (size_t i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    layer.upstream = reinterpret_cast<const double*>(upstream) + i * square;
    if (mix) layer.mix = reinterpret_cast<const double*>(mix) + i * step;
    for (int which = 0; which < 2; ++which) {
      Factor& factor = layer.factors[which];
      factor.out = reinterpret_cast<void*>(outs[which * count + i]);
      if (mix) factor.grad = reinterpret_cast<const void*>(grads[which * count + i]);
    }
  }
  return layers;
}

}  // namespace multilora
