// Selects the kernels' instruction set among those that this build contains and this CPU supports.
#pragma once
#include <string>
#include <vector>

#include "isa/kernels.h"

namespace intaglio {

// Names of the usable instruction sets, fastest first.
std::vector<std::string> isas();
// The kernels compiled for an instruction set. Throws invalid_argument if it is not usable.
const Kernels* kernels_of(const std::string& isa);

}  // namespace intaglio
