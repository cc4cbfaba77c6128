// The LoRA linear's GEMM in multilora._C_cuda.
#include "bind.h"
#include "lora_gemm.h"

namespace py = pybind11;

namespace multilora {

void bind_gemm(py::module_& m) {
  m.def(
      "lora_gemm",
      [](int dtype, bool w_depth_first, int tile_cols, int processors, uintptr_t x, uintptr_t w,
         uintptr_t s, uintptr_t q, uintptr_t bias, uintptr_t y, int64_t particles, int64_t rows,
         int64_t depth, int64_t cols, int64_t rank, int device, uintptr_t stream) {
        const auto at = [](uintptr_t place) { return reinterpret_cast<void*>(place); };
        LoraGemm problem{static_cast<DType>(dtype),
                         w_depth_first,
                         tile_cols,
                         processors,
                         at(x),
                         at(w),
                         at(s),
                         at(q),
                         at(bias),
                         at(y),
                         particles,
                         rows,
                         depth,
                         cols,
                         rank};
        lora_gemm(problem, {device, stream});
      },
      py::arg("dtype"), py::arg("w_depth_first"), py::arg("tile_cols"), py::arg("processors"),
      py::arg("x"), py::arg("w"), py::arg("s"), py::arg("q"), py::arg("bias"), py::arg("y"),
      py::arg("particles"), py::arg("rows"), py::arg("depth"), py::arg("cols"), py::arg("rank"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace multilora
