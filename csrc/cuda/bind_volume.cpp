#include <cmath>

#include "bind.h"
#include "volume.h"

namespace py = pybind11;

namespace multilora {
namespace {

// Every address is that of a tensor's first number; losses is 0 for gram_volume.
void forward(uintptr_t logits, uintptr_t targets, uintptr_t parts, uintptr_t value,
             uintptr_t losses, uintptr_t stats, uintptr_t core, int dtype, int64_t stride_k,
             int64_t stride_n, int64_t stride_target, int K, int64_t N, int64_t C, double eps,
             int kind, int device, uintptr_t stream) {
  VolumeForward p{};
  p.logits = reinterpret_cast<const void*>(logits);
  p.targets = reinterpret_cast<const int64_t*>(targets);
  p.parts = reinterpret_cast<double*>(parts);
  p.value = reinterpret_cast<void*>(value);
  p.losses = reinterpret_cast<void*>(losses);
  p.stats = reinterpret_cast<void*>(stats);
  p.core = reinterpret_cast<void*>(core);
  p.stride_k = stride_k;
  p.stride_n = stride_n;
  p.stride_target = stride_target;
  p.K = K;
  p.N = N;
  p.C = C;
  p.eps = eps;
  p.log_eps = std::log(eps);
  p.kind = VolumeKind(kind);
  volume_forward(p, DType(dtype), {device, stream});
}

void means(uintptr_t rows, uintptr_t targets, int64_t stride_target, uintptr_t nll,
           uintptr_t divergence, uintptr_t count, int dtype, int K, int64_t N, int device,
           uintptr_t stream) {
  volume_means(reinterpret_cast<const void*>(rows), reinterpret_cast<const int64_t*>(targets),
               stride_target, reinterpret_cast<void*>(nll), reinterpret_cast<void*>(divergence),
               reinterpret_cast<void*>(count), K, N, DType(dtype), {device, stream});
}

// grad_nll and count are 0 for gram_volume.
void backward(uintptr_t grad, uintptr_t grad_nll, uintptr_t count, uintptr_t logits,
              uintptr_t targets, uintptr_t stats, uintptr_t core, uintptr_t out, int dtype,
              int64_t stride_grad, int64_t stride_nll, int64_t stride_k, int64_t stride_n,
              int64_t stride_target, int K, int64_t N, int64_t C, int device, uintptr_t stream) {
  VolumeBackward p{};
  p.grad = reinterpret_cast<const void*>(grad);
  p.grad_nll = reinterpret_cast<const void*>(grad_nll);
  p.count = reinterpret_cast<const void*>(count);
  p.logits = reinterpret_cast<const void*>(logits);
  p.targets = reinterpret_cast<const int64_t*>(targets);
  p.stats = reinterpret_cast<const void*>(stats);
  p.core = reinterpret_cast<const void*>(core);
  p.out = reinterpret_cast<void*>(out);
  p.stride_grad = stride_grad;
  p.stride_nll = stride_nll;
  p.stride_k = stride_k;
  p.stride_n = stride_n;
  p.stride_target = stride_target;
  p.K = K;
  p.N = N;
  p.C = C;
  volume_backward(p, DType(dtype), {device, stream});
}

}  // namespace

void bind_volume(py::module_& m) {
  m.attr("most_particles") = kMostParticles;
  m.def("volume_parts", [](int K, int64_t N, int64_t C, int dtype) {
    return volume_parts(K, N, C, DType(dtype));
  });
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("volume_forward", &forward, release());
  m.def("volume_means", &means, release());
  m.def("volume_backward", &backward, release());
}

}  // namespace multilora
