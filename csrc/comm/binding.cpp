// Python binding (nanobind) of groups of ranks: segments, communicators with their collectives, and heartbeats.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "comm/binding.h"
#include "comm/communicator.h"
#include "comm/datagrams.h"
#include "comm/heartbeat.h"
#include "comm/tcp_channel.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace intaglio {
namespace {

using Array = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Block block_of(const Array& a) { return {a.data(), int64_t(a.shape(0)), int64_t(a.shape(1)), int64_t(a.shape(1))}; }

Wire wire_of(const std::string& name) {
  if (name == "f32") return Wire::F32;
  if (name == "bf16") return Wire::BF16;
  if (name == "f16") return Wire::F16;
  throw std::invalid_argument("wire='" + name + "'; use f32, bf16 or f16");
}

AllReduceAlgorithm algorithm_of(const std::string& name) {
  if (name == "automatic") return AllReduceAlgorithm::Automatic;
  if (name == "one_shot") return AllReduceAlgorithm::OneShot;
  if (name == "two_shot") return AllReduceAlgorithm::TwoShot;
  throw std::invalid_argument("algorithm='" + name + "'; use automatic, one_shot or two_shot");
}

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

}  // namespace

void bind_comm(nb::module_& m) {
  nb::exception<CommunicatorError>(m, "CommunicatorError", PyExc_RuntimeError);
  nb::class_<Segment>(m, "Segment")
      .def("__init__", [](Segment* self, int file) { new (self) Segment(file); }, "file"_a)
      .def_static("bytes_for", &Segment::bytes_for, "ranks"_a, "ring_bytes"_a)
      .def_static("format", &Segment::format, "file"_a, "ranks"_a, "ring_bytes"_a, "epoch"_a)
      .def_prop_ro("ranks", &Segment::ranks)
      .def_prop_ro("epoch", &Segment::epoch)
      .def_prop_ro("aborted", &Segment::aborted)
      .def("abort", [](Segment& s, int rank, const std::string& site, const std::string& cause) { s.abort({rank, site, cause}); },
           "rank"_a, "site"_a, "cause"_a)
      .def("abort_reason", [](const Segment& s) { return s.abort_reason().text(); })
      .def("post", &Segment::post, "steps"_a)
      .def("complete", &Segment::complete, "rank"_a, "steps"_a)
      .def("completed", &Segment::completed, "rank"_a)
      .def("wait_posted", &Segment::wait_posted, "rank"_a, "steps"_a, "seconds"_a, Unlocked())
      .def("wait_completed", &Segment::wait_completed, "steps"_a, "seconds"_a, Unlocked())
      .def("beats", &Segment::beats, "rank"_a);
  nb::class_<Heartbeat>(m, "Heartbeat")
      .def(nb::init<std::shared_ptr<Segment>, int, double>(), "segment"_a, "rank"_a, "seconds"_a);
  nb::class_<Datagrams>(m, "Datagrams")
      .def(nb::init<int, double>(), "socket"_a, "seconds"_a)
      .def("add", [](Datagrams& self, nb::bytes datagram) { self.add({datagram.c_str(), datagram.size()}); }, "datagram"_a)
      .def("waiting", &Datagrams::waiting);
  nb::class_<Communicator>(m, "Communicator")
      .def(nb::init<std::shared_ptr<Segment>, int>(), "segment"_a, "rank"_a)
      .def("__init__", [](Communicator* self, std::shared_ptr<Segment> segment, int rank, const std::map<int, int>& sockets) {
             std::vector<std::unique_ptr<Channel>> peers(size_t(segment->ranks()));
             for (auto [peer, socket] : sockets) peers.at(size_t(peer)) = std::make_unique<TcpChannel>(socket);
             new (self) Communicator(std::move(segment), rank, std::move(peers));
           }, "segment"_a, "rank"_a, "sockets"_a)
      .def_prop_ro("rank", &Communicator::rank)
      .def_prop_ro("ranks", &Communicator::ranks)
      .def_rw("ranks_per_host", &Communicator::ranks_per_host)
      .def_rw("timeout", &Communicator::timeout)
      .def("all_reduce", [](Communicator& c, const std::string& site, std::vector<int> group, Array x, Array out, const std::string& wire, const std::string& algorithm) {
             c.algorithm = algorithm_of(algorithm);
             const Collective collective{site, std::move(group), wire_of(wire)};
             nb::gil_scoped_release unlocked;
             c.all_reduce(collective, block_of(x), block_of(out));
           }, "site"_a, "group"_a, "x"_a, "out"_a, "wire"_a = "f32", "algorithm"_a = "automatic")
      .def("all_gather", [](Communicator& c, const std::string& site, std::vector<int> group, Array x, Array out, bool tokens, const std::string& wire) {
             const Collective collective{site, std::move(group), wire_of(wire)};
             nb::gil_scoped_release unlocked;
             c.all_gather(collective, block_of(x), block_of(out), tokens);
           }, "site"_a, "group"_a, "x"_a, "out"_a, "tokens"_a = false, "wire"_a = "f32")
      .def("reduce_scatter", [](Communicator& c, const std::string& site, std::vector<int> group, Array x, Array out, const std::string& wire) {
             const Collective collective{site, std::move(group), wire_of(wire)};
             nb::gil_scoped_release unlocked;
             c.reduce_scatter(collective, block_of(x), block_of(out));
           }, "site"_a, "group"_a, "x"_a, "out"_a, "wire"_a = "f32")
      .def("all_to_all", [](Communicator& c, const std::string& site, std::vector<int> group, Array x, Array out, const std::string& wire) {
             const Collective collective{site, std::move(group), wire_of(wire)};
             nb::gil_scoped_release unlocked;
             c.all_to_all(collective, block_of(x), block_of(out));
           }, "site"_a, "group"_a, "x"_a, "out"_a, "wire"_a = "f32")
      .def("barrier", &Communicator::barrier, "site"_a, Unlocked());
}

}  // namespace intaglio
