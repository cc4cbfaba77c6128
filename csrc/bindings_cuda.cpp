// multilora._C_cuda: the kernels for NVIDIA GPUs.
#include "cuda/bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_C_cuda, m) {
  using namespace multilora;
  m.doc() = "multilora's kernels for NVIDIA GPUs";
  m.def("build_info", [] {
    return py::dict(py::arg("compiler") = "nvcc " MULTILORA_NVCC,
                    py::arg("targets") = MULTILORA_TARGETS);
  });
  bind_volume(m);
  bind_geometry(m);
  bind_gemm(m);
}
