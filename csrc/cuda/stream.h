// Where a kernel runs. Known to the bindings, which know nothing else of CUDA.
#pragma once

#include <cstdint>

namespace multilora {

struct Stream {
  int device;
  uintptr_t handle;  // a cudaStream_t
};

}  // namespace multilora
