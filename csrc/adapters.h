// How the bindings get the layers of adapters. A view for each factor would take Python longer than
// a small problem takes: all factors are contiguous and of one dtype, so that addresses are enough.
#pragma once

#include <stdexcept>
#include <vector>

#include "geometry.h"
#include "view.h"

namespace multilora {

// The factors of all layers: those of lora_A, then those of lora_B.
struct Factors {
  DType dtype;
  int particles;
  std::vector<int64_t> sizes;  // rank, d_in, d_out of every layer
  std::vector<uintptr_t> addresses;
};

// The pointers of tensors that have the factors' shapes, in the factors' order; empty for None.
struct Addresses {
  std::vector<uintptr_t> list;
};

using Scalings = std::vector<double>;

inline std::vector<Layer> layers_of(const Factors& factors, const Scalings& scaling) {
  size_t count = scaling.size();
  if (factors.sizes.size() != 3 * count || factors.addresses.size() != 2 * count) {
    throw std::invalid_argument("multilora: the lists of factors and of scalings do not fit");
  }
  std::vector<Layer> layers(count);
  for (size_t i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    layer.rank = int(factors.sizes[3 * i]);
    layer.scaling = scaling[i];
    for (int which = 0; which < 2; ++which) {
      Factor& factor = layer.factors[which];
      factor.x = reinterpret_cast<const void*>(factors.addresses[which * count + i]);
      factor.d = factors.sizes[3 * i + 1 + which];
      factor.is_B = which == 1;
    }
  }
  return layers;
}

// out: T or D of all layers (L, K, K), contiguous.
inline std::vector<Layer> layers_of_traces(const Factors& factors, const Scalings& scaling,
                                           const View& out) {
  std::vector<Layer> layers = layers_of(factors, scaling);
  int64_t K = factors.particles;
  expect("out", out, {int64_t(layers.size()), K, K});
  char* place = static_cast<char*>(out.data);
  for (Layer& layer : layers) {
    layer.traces = place;
    place += size_of(out.dtype) * K * K;
  }
  return layers;
}

// upstream: dL/dT, float64 (L, K, K), contiguous. mix: float64 (L, K, K) or (L, K), contiguous, or
// left out; then there are no grads.
inline std::vector<Layer> layers_of_gradients(const Factors& factors, const Scalings& scaling,
                                              const Addresses& outs, const View& upstream,
                                              const View& mix, const Addresses& grads) {
  std::vector<Layer> layers = layers_of(factors, scaling);
  size_t count = layers.size();
  int64_t L = int64_t(count), K = factors.particles;
  expect("upstream", upstream, {L, K, K});
  if (mix.data && mix.dims == 2) expect("mix", mix, {L, K});
  if (mix.data && mix.dims != 2) expect("mix", mix, {L, K, K});
  if (outs.list.size() != 2 * count || grads.list.size() != (mix.data ? 2 * count : 0)) {
    throw std::invalid_argument("multilora: the lists of outs and grads do not fit the factors");
  }
  int64_t step = mix.dims == 3 ? K * K : K;
  for (size_t i = 0; i < count; ++i) {
    Layer& layer = layers[i];
    layer.upstream = static_cast<const double*>(upstream.data) + int64_t(i) * K * K;
    if (mix.data) layer.mix = static_cast<const double*>(mix.data) + int64_t(i) * step;
    for (int which = 0; which < 2; ++which) {
      Factor& factor = layer.factors[which];
      factor.out = reinterpret_cast<void*>(outs.list[which * count + i]);
      if (mix.data) factor.grad = reinterpret_cast<const void*>(grads.list[which * count + i]);
    }
  }
  return layers;
}

}  // namespace multilora
