// Chain all-reduce over hosts with several ranks each: a host adds its ranks' values to the sum of the hosts before it.
// Hosts cannot sum their own ranks first, as that would add in another order than that of the ranks. But ranks of one
// host are neighbours in it, so the next host can continue the sum. A value crosses the network once in each direction.
#include <map>

#include "comm/part.h"

namespace intaglio {

int Communicator::ranks_of_hosts(const Collective& c) const {
  if (ranks_per_host < 2 || c.wire != Wire::F32) return 0;  // a rounded sum of the ranks so far would be another value
  std::map<int, int> hosts;
  for (int rank : c.group) hosts[rank / ranks_per_host]++;
  const int ranks = hosts.begin()->second, count = int(hosts.size());
  for (auto [host, members] : hosts)
    if (members != ranks) return 0;
  // Time in units of sending all values over one host's link: 2 * ranks * (count - 1) / count in two_shot, where all hosts send at
  // once; 2 * (count - 1) here, as one host after the other sends the sum and then the last one sends it to each.
  return count > 1 && ranks > 1 && count <= ranks ? ranks : 0;
}

void Communicator::all_reduce_in_chain(const Collective& c, int each, Block x, Block out) {
  const int me = index_in(c), hosts = int(c.group.size()) / each, host = me / each, place = me % each;
  auto part = [&](int i) { return i == each ? x.values() : x.values() * i / each / 16 * 16; };
  auto size = [&](int i) { return part(i + 1) - part(i); };
  auto member = [&](int h, int i) { return c.group[size_t(h * each + i)]; };
  // Each rank of a host sums one part: it continues the sum of its partner on the host before.
  for (int k = 1; k < each; k++) {
    const int to = (place + k) % each;
    queue(c.site, member(host, to), {x, part(to), size(to), c.wire});
  }
  Collective near{c.site, {}, c.wire};
  if (host) near.group.push_back(member(host - 1, place));
  for (int i = 0; i < each; i++) near.group.push_back(member(host, i));
  fold(near, (host > 0) + place, x, out, part(place), size(place));
  // The last host has the sum and sends it to the others. It comes to a rank only after what that rank sends here was received.
  std::vector<Part> parts;
  std::vector<Expected> expected;
  parts.reserve(size_t(each));
  if (host == hosts - 1) {
    for (int h = 0; h < host; h++) queue(c.site, member(h, place), {out, part(place), size(place), c.wire});
  } else {
    queue(c.site, member(host + 1, place), {out, part(place), size(place), c.wire});
    parts.emplace_back(c.wire, out, part(place), size(place));
    expected.push_back({member(hosts - 1, place), &parts.back()});
    exchange(c.site, expected, c.wire);
  }
  parts.clear(), expected.clear();
  for (int k = 1; k < each; k++) {
    const int other = (place + k) % each;
    queue(c.site, member(host, other), {out, part(place), size(place), c.wire});
    parts.emplace_back(c.wire, out, part(other), size(other));
    expected.push_back({member(host, other), &parts.back()});
  }
  exchange(c.site, expected, c.wire);
}

}  // namespace intaglio
