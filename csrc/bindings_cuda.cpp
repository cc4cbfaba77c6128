// multilora._C_cuda: the kernels for NVIDIA GPUs.
#include <cmath>
#include <utility>

#include "bindings.h"
#include "cuda/geometry.h"
#include "cuda/lora_gemm.h"
#include "cuda/volume.h"

namespace py = pybind11;

namespace multilora {
namespace {

// `where` in Python: the device and the stream of a call.
using DeviceAndStream = std::pair<int, uintptr_t>;

Stream stream_of(const DeviceAndStream& pair) { return {pair.first, pair.second}; }

void traces(const View& out, const Factors& factors, const Scalings& scaling, const View& workspace,
            bool distance, const DeviceAndStream& stream) {
  Adapters adapters{factors.dtype, factors.particles, distance, false};
  geometry(adapters, layers_of_traces(factors, scaling, out), static_cast<double*>(workspace.data),
           stream_of(stream));
}

void factor_gradients(const Addresses& outs, const View& upstream, const Factors& factors,
                      const Scalings& scaling, const View& mix, const Addresses& grads,
                      const View& workspace, const DeviceAndStream& stream) {
  Adapters adapters{factors.dtype, factors.particles, false, mix.dims == 3};
  geometry(adapters, layers_of_gradients(factors, scaling, outs, upstream, mix, grads),
           static_cast<double*>(workspace.data), stream_of(stream));
}

int64_t traces_workspace(const Factors& factors) {
  Scalings scaling(factors.sizes.size() / 3, 1.0);
  return geometry_workspace(factors.particles, layers_of(factors, scaling));
}

// rows: the values (N,), or the losses with the values below them (K + 1, N).
void forward(const View& logits, const View& targets, const View& rows, const Saved& saved,
             const View& workspace, double eps, bool det, const DeviceAndStream& stream) {
  auto p = volume_of<CudaVolumeForward>(logits, targets, saved);
  if (rows.dims == 2) {
    expect("rows", rows, {p.K + 1, p.N});
    p.losses = rows.data;
  } else {
    expect("rows", rows, {p.N});
  }
  p.value = static_cast<char*>(rows.data) + (p.losses ? p.K * p.N * size_of(rows.dtype) : 0);
  p.parts = static_cast<double*>(workspace.data);
  p.eps = eps;
  p.log_eps = std::log(eps);
  p.kind = volume_kind(det, p.K, p.C);
  volume_forward(p, logits.dtype, stream_of(stream));
}

void means(const View& rows, const View& targets, const View& nll, const View& divergence,
           const View& count, const DeviceAndStream& stream) {
  int64_t K = nll.sizes[0], N = targets.sizes[0];
  expect("rows", rows, {K + 1, N});
  expect("divergence", divergence, {});
  expect("count", count, {});
  volume_means(rows.data, static_cast<const int64_t*>(targets.data), targets.strides[0], nll.data,
               divergence.data, count.data, int(K), N, rows.dtype, stream_of(stream));
}

void backward(const View& logits, const View& targets, const Saved& saved, const View& grad,
              const View& grad_nll, const View& count, const View& out,
              const DeviceAndStream& stream) {
  auto p =
      volume_gradient_of<CudaVolumeBackward>(logits, targets, saved, grad, grad_nll, count, out);
  volume_backward(p, logits.dtype, stream_of(stream));
}

// adapter: S and Q. tiling: the width of a tile, and how many blocks run at a time.
void gemm(const View& y, const View& x, const View& w, const std::pair<View, View>& adapter,
          const View& bias, bool w_depth_first, const std::pair<int, int>& tiling,
          const DeviceAndStream& stream) {
  const auto& [s, q] = adapter;
  int64_t particles = x.sizes[0], rows = x.sizes[1], depth = x.sizes[2], cols = y.sizes[2];
  int64_t rank = s.sizes[2];
  expect("y", y, {particles, rows, cols});
  expect("s", s, {particles, rows, rank});
  if (w_depth_first) {
    expect("w", w, {depth, cols});
    expect("q", q, {particles, rank, cols});
  } else {
    expect("w", w, {cols, depth});
    expect("q", q, {particles, cols, rank});
  }
  if (bias.data) expect("bias", bias, {cols});
  lora_gemm({x.dtype, w_depth_first, tiling.first, tiling.second, x.data, w.data, s.data, q.data,
             bias.data, y.data, particles, rows, depth, cols, rank},
            stream_of(stream));
}

}  // namespace
}  // namespace multilora

PYBIND11_MODULE(_C_cuda, m) {
  using namespace multilora;
  using release = py::call_guard<py::gil_scoped_release>;
  m.doc() = "multilora's kernels for NVIDIA GPUs";
  m.attr("most_particles") = kMostParticles;
  m.def("build_info", [] {
    return py::dict(py::arg("compiler") = "nvcc " MULTILORA_NVCC,
                    py::arg("targets") = MULTILORA_TARGETS);
  });
  m.def("traces_workspace", &traces_workspace, py::arg("factors"));
  m.def("traces", &traces, py::arg("out"), py::arg("factors"), py::arg("scaling"),
        py::arg("workspace"), py::kw_only(), py::arg("distance"), py::arg("where"));
  m.def("factor_gradients", &factor_gradients, py::arg("outs"), py::arg("upstream"),
        py::arg("factors"), py::arg("scaling"), py::arg("mix"), py::arg("grads"),
        py::arg("workspace"), py::kw_only(), py::arg("where"));
  m.def(
      "volume_workspace",
      [](const View& logits) {
        return volume_parts(int(logits.sizes[0]), logits.sizes[1], logits.sizes[2], logits.dtype);
      },
      py::arg("logits"));
  m.def("volume_forward", &forward, py::arg("logits"), py::arg("targets"), py::arg("rows"),
        py::arg("saved"), py::arg("workspace"), py::kw_only(), py::arg("eps"), py::arg("det"),
        py::arg("where"), release());
  m.def("volume_means", &means, py::arg("rows"), py::arg("targets"), py::arg("nll"),
        py::arg("divergence"), py::arg("count"), py::kw_only(), py::arg("where"), release());
  m.def("volume_backward", &backward, py::arg("logits"), py::arg("targets"), py::arg("saved"),
        py::arg("grad"), py::arg("grad_nll"), py::arg("count"), py::arg("out"), py::kw_only(),
        py::arg("where"), release());
  m.def("lora_gemm", &gemm, py::arg("y"), py::arg("x"), py::arg("w"), py::arg("adapter"),
        py::arg("bias"), py::kw_only(), py::arg("w_depth_first"), py::arg("tiling"),
        py::arg("where"));
}
