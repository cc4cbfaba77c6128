// Memory for the CPU's kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "../common.h"

namespace multilora {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

// At least `bytes`, in whole units of `alignment`; null where there is no memory left.
inline Memory allocate(int64_t bytes, int64_t alignment) {
  int64_t size = ceil_div(bytes, alignment) * alignment;
  return Memory(std::aligned_alloc(size_t(alignment), size_t(size)));
}

}  // namespace multilora
