// The function that adds csrc/comm (segments, communicators, heartbeats, datagrams) to the Python module.
#pragma once
#include <nanobind/nanobind.h>

namespace intaglio {

// Adds the classes Segment, Heartbeat, Datagrams and Communicator to `m`.
void bind_comm(nanobind::module_& m);

}  // namespace intaglio
