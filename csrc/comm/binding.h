#pragma once
#include <nanobind/nanobind.h>

namespace intaglio {

// Adds groups of ranks to the module.
void bind_comm(nanobind::module_& m);

}  // namespace intaglio
