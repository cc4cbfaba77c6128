// How tensors come in. csrc knows nothing of PyTorch: multilora/ops/native.py describes every
// tensor by its address, its dtype, its sizes and its strides, and the bindings make a View of
// them.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common.h"

namespace multilora {

// A tensor of up to three dimensions; strides count elements. A dimension that the tensor lacks has
// size 1 and stride 0. `data` is null where Python passes None.
struct View {
  void* data;
  DType dtype;
  int dims;
  int64_t sizes[3], strides[3];
};

// Compares a view with the shape that the kernels assume. Python has checked its callers' shapes:
// what is found here are arguments of a native function that were swapped.
inline void expect(const char* name, const View& view, std::initializer_list<int64_t> sizes) {
  bool fits = view.dims == int(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = view.sizes[i] == sizes.begin()[i];
  if (fits) return;
  auto text = [](const int64_t* first, size_t count) {
    std::string list;
    for (size_t i = 0; i < count; ++i) list += (i ? ", " : "") + std::to_string(first[i]);
    return "(" + list + ")";
  };
  throw std::invalid_argument("multilora: " + std::string(name) + " " +
                              text(view.sizes, size_t(view.dims)) + " should be " +
                              text(sizes.begin(), sizes.size()));
}

}  // namespace multilora
