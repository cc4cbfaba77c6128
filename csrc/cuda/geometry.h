// The launches of adapter geometry, for all layers together.
#pragma once

#include <vector>

#include "../geometry.h"
#include "stream.h"

namespace multilora {

// The float64 numbers of workspace that `geometry` needs.
int64_t geometry_workspace(int particles, const std::vector<Layer>& layers);

// The layers' traces, or the gradients of their factors.
void geometry(const Adapters& adapters, const std::vector<Layer>& layers, double* workspace,
              Stream stream);

}  // namespace multilora
