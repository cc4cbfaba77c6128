// The operators' functions in multilora._C.
#pragma once

#include <pybind11/pybind11.h>

namespace multilora {

void bind_volume(pybind11::module_& m);
void bind_geometry(pybind11::module_& m);

}  // namespace multilora
