// Adapter geometry on the CPU: the function that the bindings call.
#pragma once

#include <vector>

#include "../geometry.h"

namespace multilora {

// Computes the layers' traces, or the gradients of their factors.
void geometry(const Adapters& adapters, const std::vector<Layer>& layers, int threads);

}  // namespace multilora
