// Communicator::Part: receives values that another rank has already summed, and writes them to a range of a block.
#pragma once
#include <stdexcept>
#include <string>

#include "comm/communicator.h"
#include "comm/wire.h"

namespace intaglio {

struct Communicator::Part : Sink {
  Wire wire;
  Block out;
  int64_t first, count;
  Part(Wire wire, Block out, int64_t first, int64_t count) : wire(wire), out(out), first(first), count(count) {}
  void begin(int64_t bytes) override {
    if (bytes != count * wire_bytes(wire)) throw std::invalid_argument("brings " + std::to_string(bytes) + " bytes of a sum");
  }
  int64_t ready(int64_t at) override { return count - at; }
  void take(const uint8_t* values, int64_t at, int64_t n) override {
    runs(out, first + at, n, [&](float* p, int64_t done, int64_t run) {
      each(wire, values + done * wire_bytes(wire), run, [=](int64_t i, float y) { p[i] = y; });
    });
  }
};

}  // namespace intaglio
