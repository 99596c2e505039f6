#pragma once
#include <nanobind/nanobind.h>

namespace intaglio {

// Adds the classes of csrc/comm (Segment, Heartbeat, Datagrams, Communicator) to the Python module.
void bind_comm(nanobind::module_& m);

}  // namespace intaglio
