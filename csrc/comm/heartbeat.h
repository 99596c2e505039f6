// Heartbeat: a thread that increments the rank's beat counter in the segment, to show that the rank's process runs.
#pragma once
#include <memory>

#include "comm/interval.h"
#include "comm/segment.h"

namespace intaglio {

class Heartbeat {
 public:
  Heartbeat(std::shared_ptr<Segment> segment, int rank, double seconds)
      : segment_(std::move(segment)), interval_(seconds, [of = segment_.get(), rank] { of->beat(rank); }) {}

 private:
  std::shared_ptr<Segment> segment_;  // not held by the thread: letting go of it may need Python's lock, which whoever joins has
  Interval interval_;
};

}  // namespace intaglio
