// Communicator::Fold: receives one member's values of a reduction, and adds them to the sum in the group's order.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/wire.h"

namespace intaglio {

// A sum in the order of the group: what member i brings is added when that of all before it has been. This rank's own
// values are added together with those of the member before, or the one after if it is the first. With an addition the last
// step writes its total, which may be where x is: so that step takes no value before x has been sent that far.
struct Communicator::Fold : Sink {
  struct Sum {
    const Communicator& of;
    Wire wire;
    Block x, out;
    Addition more;
    int64_t first, count;
    int own;
    std::vector<int64_t> done;  // values by member
    // The last member before this one that is not this rank; below 0: there is none.
    int before(int member) const { return member - 1 == own ? member - 2 : member - 1; }
    bool adds_to(int member) const { return more.total.data && member == before(int(done.size())); }
  };
  Sum& s;
  int member;
  Fold(Sum& sum, int member) : s(sum), member(member) {}

  void begin(int64_t bytes) override {
    if (bytes != s.count * wire_bytes(s.wire))
      throw std::invalid_argument("brings " + std::to_string(bytes) + " bytes; this rank needs " + std::to_string(s.count * wire_bytes(s.wire)));
  }
  int64_t ready(int64_t at) override {
    const int before = s.before(member);
    const int64_t until = before < 0 ? s.count : s.done[size_t(before)];
    return (s.adds_to(member) ? std::min(until, s.of.sent(s.x)) : until) - at;
  }
  void take(const uint8_t* values, int64_t at, int64_t n) override {
    const bool last = s.adds_to(member);
    auto add = [&](float* out, int64_t done, int64_t run) {
      const uint8_t* v = values + done * wire_bytes(s.wire);
      const float* x = value_at(s.x, s.first + at + done);
      const bool starts = member == 0, after = s.own == 0 && member == 1, before = s.own == member + 1;
      if (last) {
        auto y = reinterpret_cast<const float*>(v);
        const float* more = value_at(s.more.values, s.first + at + done);
        float* total = value_at(s.more.total, s.first + at + done);
        auto write = [=](auto sum) {
#pragma GCC ivdep  // total may be x, number by number: so vectors may be read before they are written
          for (int64_t i = 0; i < run; i++) total[i] = more[i] + sum(i);
        };
        if (after) write([=](int64_t i) { return x[i] + y[i]; });
        else if (starts && before) write([=](int64_t i) { return y[i] + x[i]; });
        else if (before) write([=](int64_t i) { return out[i] + y[i] + x[i]; });
        else write([=](int64_t i) { return out[i] + y[i]; });
      } else if (s.wire == Wire::F32 && after) each(s.wire, v, run, [=](int64_t i, float y) { out[i] = x[i] + y; });
      else if (s.wire == Wire::F32 && starts && before) each(s.wire, v, run, [=](int64_t i, float y) { out[i] = y + x[i]; });
      else
        each(s.wire, v, run, [&](int64_t i, float y) {
          float sum = starts ? y : (after ? carried(s.wire, x[i]) : out[i]) + y;
          out[i] = before ? sum + carried(s.wire, x[i]) : sum;
        });
    };
    runs(s.out, s.first + at, n, add, s.x.ld != s.x.cols || (last && (s.more.values.ld != s.x.cols || s.more.total.ld != s.x.cols)));
    s.done[size_t(member)] += n;
  }
};

}  // namespace intaglio
