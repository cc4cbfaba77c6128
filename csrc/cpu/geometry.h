// Adapter geometry on the CPU: what the bindings call.
#pragma once

#include <vector>

#include "../geometry.h"

namespace multilora {

// The layers' traces, or the gradients of their factors.
void geometry(const Adapters& adapters, const std::vector<Layer>& layers, int threads);

}  // namespace multilora
