// Adapter geometry in multilora._C_cuda.
#include <pybind11/stl.h>

#include "../adapters.h"
#include "bind.h"
#include "geometry.h"

namespace py = pybind11;

namespace multilora {
namespace {

void lora_gram(uintptr_t out, bool distance, int dtype, int particles, const Sizes& sizes,
               const Scalings& scaling, const Addresses& factors, uintptr_t workspace, int device,
               uintptr_t stream) {
  Adapters adapters{DType(dtype), particles, distance, false};
  geometry(adapters, layers_of_traces(adapters, out, sizes, scaling, factors),
           reinterpret_cast<double*>(workspace), {device, stream});
}

void lora_gram_backward(const Addresses& outs, uintptr_t upstream, int dtype, int particles,
                        const Sizes& sizes, const Scalings& scaling, const Addresses& factors,
                        const Addresses& grads, uintptr_t mix, bool mix_is_full,
                        uintptr_t workspace, int device, uintptr_t stream) {
  Adapters adapters{DType(dtype), particles, false, mix_is_full};
  geometry(adapters,
           layers_of_gradients(adapters, outs, upstream, sizes, scaling, factors, grads, mix),
           reinterpret_cast<double*>(workspace), {device, stream});
}

}  // namespace

void bind_geometry(py::module_& m) {
  m.def("geometry_workspace", [](int particles, const Sizes& sizes) {
    size_t layers = sizes.size() / 3;
    return geometry_workspace(
        particles, layers_of(sizes, Scalings(layers, 1.0), Addresses(2 * layers, 0)));
  });
  m.def("lora_gram", &lora_gram);
  m.def("lora_gram_backward", &lora_gram_backward);
}

}  // namespace multilora
