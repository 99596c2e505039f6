// The collectives of a communicator, and its waits, which end at a deadline or by the abort word.
#include "comm/communicator.h"

#include <poll.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "comm/fold.h"
#include "comm/part.h"
#include "comm/shm_channel.h"
#include "comm/wire.h"

namespace intaglio {

namespace {

constexpr uint64_t kMagic = 0x6d6d6f6367746e69;  // "intgcomm"
constexpr int64_t kChunk = 32 << 10;             // bytes handed over at a time, so that the peer works on them meanwhile
constexpr int64_t kTwoShot = 64 << 10;           // bytes from which more than two ranks reduce in two steps

uint64_t hash(const std::string& text) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325;
  for (unsigned char c : text) h = (h ^ c) * 0x100000001b3;
  return h;
}

}  // namespace

void Communicator::Flat::encode(int64_t at, int64_t n, uint8_t* to) const {
  runs(block, first + at, n, [&](float* p, int64_t done, int64_t run) {
    intaglio::encode(wire, p, run, to + done * wire_bytes(wire));
  });
}

// Values that go to a block as they are. `columns`: blocks side by side in one tensor, the widths of which are known only
// when every member's message has begun.
struct Communicator::Place : Sink {
  struct Columns {
    Block out;
    std::vector<int64_t> widths;  // by member; -1: not known yet
    int64_t before(int member) const {
      int64_t sum = 0;
      for (int i = 0; i < member; i++) sum += widths[size_t(i)];
      return sum;
    }
    bool known() const { return std::none_of(widths.begin(), widths.end(), [](int64_t w) { return w < 0; }); }
    void check() const {
      if (known() && out.rows && before(int(widths.size())) != out.cols)
        throw std::invalid_argument("and the others bring " + std::to_string(before(int(widths.size()))) + " columns together; wanted " + std::to_string(out.cols));
    }
  };
  Wire wire;
  Block to;
  Columns* columns;
  int member;
  Place(Wire wire, Block to) : wire(wire), to(to), columns(nullptr), member(0) {}
  Place(Wire wire, Columns* columns, int member) : wire(wire), to{}, columns(columns), member(member) {}

  void begin(int64_t bytes) override {
    if (columns) {
      const int64_t rows = columns->out.rows, values = bytes / wire_bytes(wire);
      columns->widths[size_t(member)] = rows ? values / rows : 0;
      if (values && (!rows || values % rows)) throw std::invalid_argument("brings " + std::to_string(values) + " values for " + std::to_string(rows) + " rows");
      columns->check();
    } else if (bytes != to.values() * wire_bytes(wire)) {
      throw std::invalid_argument("brings " + std::to_string(bytes) + " bytes; this rank needs " + std::to_string(to.values() * wire_bytes(wire)));
    }
  }
  int64_t ready(int64_t at) override {
    if (columns && !to.data) {
      if (!columns->known()) return 0;
      to = columns->out.columns_of(columns->before(member), columns->widths[size_t(member)]);
    }
    return to.values() - at;
  }
  void take(const uint8_t* values, int64_t at, int64_t n) override {
    runs(to, at, n, [&](float* p, int64_t done, int64_t run) {
      if (wire == Wire::F32) std::memcpy(p, values + done * 4, size_t(run) * 4);
      else each(wire, values + done * 2, run, [=](int64_t i, float y) { p[i] = y; });
    });
  }
};

Communicator::Communicator(std::shared_ptr<Segment> segment, int rank, std::vector<std::unique_ptr<Channel>> peers)
    : segment_(std::move(segment)), rank_(rank), peers_(size_t(segment_->ranks())) {
  if (rank < 0 || rank >= ranks()) throw std::invalid_argument("rank=" + std::to_string(rank) + " is outside 0.." + std::to_string(ranks() - 1));
  if (!peers.empty() && peers.size() != peers_.size()) throw std::invalid_argument("channels to other ranks than the group has");
  peers.resize(peers_.size());
  for (int i = 0; i < this->ranks(); i++) {
    if (i == rank) continue;
    std::unique_ptr<Channel>& given = peers[size_t(i)];
    polled_ |= given && given->descriptor() >= 0;
    peers_[size_t(i)].channel = given ? std::move(given) : std::make_unique<ShmChannel>(segment_, rank, i);
  }
}

Communicator::Communicator(std::shared_ptr<Segment> segment, int rank) : Communicator(std::move(segment), rank, {}) {}

void Communicator::stop(const std::string& site, const std::string& cause) {
  for (Peer& peer : peers_) {
    peer.outbox.clear();  // what they point to may go
    if (peer.channel) peer.channel->close();
  }
  throw CommunicatorError(rank_, site, cause);
}

void Communicator::fail(const std::string& site, const std::string& cause) {
  segment_->abort({rank_, site, cause});
  stop(site, cause);
}

template <class Call>
void Communicator::guard(const std::string& site, int peer, Call call) {
  try {
    call();
  } catch (const CommunicatorError&) {
    throw;
  } catch (const std::exception& error) {
    fail(site, "rank " + std::to_string(peer) + " " + error.what());
  }
}

int Communicator::index_in(const Collective& c) {
  for (int r : c.group)
    if (r < 0 || r >= ranks()) fail(c.site, "its group has rank " + std::to_string(r) + " of " + std::to_string(ranks()));
  auto at = std::find(c.group.begin(), c.group.end(), rank_);
  if (at == c.group.end()) fail(c.site, "this rank is not in its group");
  return int(at - c.group.begin());
}

void Communicator::queue(const std::string& site, int peer, Flat from) {
  Peer& to = peers_[size_t(peer)];
  Message m{};
  m.header = {kMagic, segment_->epoch(), to.sent++, uint64_t(from.count * wire_bytes(from.wire)), hash(site), {}};
  m.from = from;
  to.outbox.push_back(std::move(m));
}

// Sends what fits of the messages to a peer. True if anything moved.
bool Communicator::push(Peer& peer) {
  const bool moved = fill(peer);
  if (moved) peer.channel->flush();
  return moved;
}

bool Communicator::fill(Peer& peer) {
  bool moved = false;
  while (!peer.outbox.empty()) {
    Message& m = peer.outbox.front();
    Bytes room = peer.channel->space();
    if (m.sent < 0) {
      if (room.size < sizeof(Header)) return moved;
      std::memcpy(room.data, &m.header, sizeof(Header));
      m.sent = 0;
      peer.channel->commit(sizeof(Header));
    } else if (m.sent < m.bytes()) {
      const int64_t size = wire_bytes(m.from.wire), n = std::min({m.bytes() - m.sent, int64_t(room.size), kChunk}) / size * size;
      if (!n) return moved;
      if (m.own.empty()) m.from.encode(m.sent / size, n / size, room.data);
      else std::memcpy(room.data, m.own.data() + m.sent, size_t(n));
      m.sent += n;
      peer.channel->commit(size_t(n));
    } else {
      if (int64_t(room.size) < m.padding()) return moved;
      std::memset(room.data, 0, size_t(m.padding()));
      if (m.padding()) peer.channel->commit(size_t(m.padding()));
      peer.outbox.pop_front();
    }
    moved = true;
  }
  return moved;
}

// Takes what has come of the next message from a peer. True if anything moved.
bool Communicator::pull(const std::string& site, Expected& e, int64_t value_bytes) {
  Peer& peer = peers_[size_t(e.peer)];
  bool moved = false;
  while (!e.over) {
    const size_t padding = size_t(-e.bytes & (kAlign - 1));
    if (e.bytes >= 0 && e.taken == e.bytes && !padding) {  // the peer may have gone, all of its message being here
      e.over = true;
      return true;
    }
    const Bytes there = peer.channel->arrived();
    if (peer.dropping) {
      const uint64_t n = std::min<uint64_t>(peer.dropping, there.size);
      if (!n) return moved;
      peer.channel->consume(n), peer.dropping -= n;
    } else if (e.bytes < 0) {
      if (there.size < sizeof(Header)) return moved;
      Header h;
      std::memcpy(&h, there.data, sizeof h);
      if (h.magic != kMagic) throw std::invalid_argument("sends what is no message");
      peer.channel->consume(sizeof h);
      if (h.epoch < segment_->epoch()) {
        peer.dropping = h.bytes + (-h.bytes & uint64_t(kAlign - 1));
      } else {
        if (h.epoch > segment_->epoch())
          throw std::invalid_argument("is of epoch " + std::to_string(h.epoch) + "; this rank is of epoch " + std::to_string(segment_->epoch()));
        if (h.sequence != peer.received || h.site != hash(site))
          throw std::invalid_argument("is at another collective: its message " + std::to_string(h.sequence) + " came where message " +
                                      std::to_string(peer.received) + " of this site was due");
        e.sink->begin(int64_t(h.bytes));
        e.bytes = int64_t(h.bytes), peer.received++;
      }
    } else if (e.taken < e.bytes) {
      const int64_t at = e.taken / value_bytes;
      const int64_t n = std::min({int64_t(there.size) / value_bytes, e.sink->ready(at), e.bytes / value_bytes - at, kChunk / value_bytes});
      if (!n) return moved;
      e.sink->take(there.data, at, n);
      e.taken += n * value_bytes;
      peer.channel->consume(size_t(n * value_bytes));
    } else {
      if (there.size < padding) return moved;
      peer.channel->consume(padding);
      e.over = true;
    }
    moved = true;
  }
  return moved;
}

bool Communicator::push_all(const std::string& site) {
  bool moved = false;
  for (int i = 0; i < ranks(); i++) {
    Peer& peer = peers_[size_t(i)];
    if (peer.channel) guard(site, i, [&] { moved |= peer.outbox.empty() ? false : push(peer); });
  }
  return moved;
}


// Whether all that was queued has left this process; not `whole`: all but what send() copied, which may leave later.
bool Communicator::all_sent(bool whole) {
  return std::all_of(peers_.begin(), peers_.end(), [&](Peer& peer) {
    if (!peer.channel) return true;
    if (peer.outbox.empty()) return peer.channel->flushed();
    return !whole && std::none_of(peer.outbox.begin(), peer.outbox.end(), [](const Message& m) { return m.own.empty(); });
  });
}

// Until this rank's bell is rung, or a channel with a descriptor has news. With both kinds, the sleep is short.
void Communicator::sleep(uint32_t seen, double seconds) {
  if (!polled_) return segment_->bell(rank_).sleep(seen, seconds);
  std::vector<pollfd> news;
  for (Peer& peer : peers_) {
    if (!peer.channel || peer.channel->descriptor() < 0) continue;
    const bool sending = !peer.outbox.empty() || !peer.channel->flushed();
    news.push_back({peer.channel->descriptor(), short(POLLIN | (sending ? POLLOUT : 0)), 0});
  }
  poll(news.data(), nfds_t(news.size()), 1);
}

template <class Step, class Waiting>
void Communicator::until(const std::string& site, Step step, Waiting waiting) {
  const double deadline = steady_seconds() + timeout;
  Bell& bell = segment_->bell(rank_);
  int64_t idled = 0;
  for (int turn = 0;;) {
    Progress p = step();
    if (p.done) return;
    if (segment_->aborted()) stop(site, segment_->abort_reason().text());
    if (p.moved) turn = 0;
    else if (++turn < kSpinTurns) {
      if (idle) idle(idled++);
      spin_pause();
    } else {
      const double left = deadline - steady_seconds();
      if (left <= 0) {
        char seconds[32];
        std::snprintf(seconds, sizeof seconds, "%g s", timeout);
        fail(site, waiting() + " in " + seconds);
      }
      const uint32_t seen = bell.rung.load();
      bell.sleeping.store(1);
      p = step();
      if (!p.done && !p.moved && !segment_->aborted()) sleep(seen, left);
      bell.sleeping.store(0);
      if (p.done) return;
      if (p.moved) turn = 0;
    }
  }
}

void Communicator::exchange(const std::string& site, std::vector<Expected>& expected, Wire wire) {
  auto step = [&] {
    bool moved = push_all(site), over = true;
    for (Expected& e : expected) {
      if (e.over) continue;
      guard(site, e.peer, [&] { moved |= pull(site, e, wire_bytes(wire)); });
      over &= e.over;
    }
    return Progress{moved, over && all_sent(false)};
  };
  until(site, step, [&] {
    for (Expected& e : expected)
      if (!e.over) return "nothing came from rank " + std::to_string(e.peer);
    for (int i = 0; i < ranks(); i++)
      if (!peers_[size_t(i)].outbox.empty()) return "rank " + std::to_string(i) + " took nothing";
    return std::string("nothing moved");
  });
}

void Communicator::fold(const Collective& c, int me, Block x, Block out, int64_t first, int64_t count, const Addition& more) {
  Fold::Sum sum{*this, c.wire, x, out, more, first, count, me, std::vector<int64_t>(c.group.size())};
  std::vector<Fold> sinks;
  std::vector<Expected> expected;
  sinks.reserve(c.group.size());
  for (int i = 0; i < int(c.group.size()); i++) {
    if (i == me) continue;
    sinks.emplace_back(sum, i);
    expected.push_back({c.group[size_t(i)], &sinks.back()});
  }
  if (expected.empty()) return copy(c.wire, x, out);
  exchange(c.site, expected, c.wire);
  round_block(c.wire, out, first, count);
}

bool Communicator::two_shot(const Collective& c, int64_t values) const {
  const size_t n = c.group.size();
  return algorithm == AllReduceAlgorithm::Automatic ? n > 2 && values * wire_bytes(c.wire) >= kTwoShot
                                                    : algorithm == AllReduceAlgorithm::TwoShot && n > 1;
}

int64_t Communicator::sent(const Block& x) const {
  int64_t least = x.values();
  for (const Peer& peer : peers_)
    for (const Message& m : peer.outbox)
      if (m.own.empty() && m.from.block.data == x.data) least = std::min(least, m.from.first + std::max<int64_t>(m.sent, 0) / wire_bytes(m.from.wire));
  return least;
}

void Communicator::all_reduce(const Collective& c, Block x, Block out, const Addition& more) {
  const int me = index_in(c), n = int(c.group.size());
  const int64_t values = x.values();
  if (more.total.data && !adds_on_arrival(c, values)) fail(c.site, "it cannot add to its sum");
  if (!two_shot(c, values)) {
    for (int k = 1; k < n; k++) queue(c.site, c.group[size_t((me + k) % n)], {x, 0, values, c.wire});
    return fold(c, me, x, out, 0, values, more);
  }
  if (const int each = algorithm == AllReduceAlgorithm::Automatic ? ranks_of_hosts(c) : 0) return all_reduce_in_chain(c, each, x, out);
  auto part = [&](int i) { return i == n ? values : values * i / n / 16 * 16; };
  for (int k = 1; k < n; k++) {
    const int to = (me + k) % n;
    queue(c.site, c.group[size_t(to)], {x, part(to), part(to + 1) - part(to), c.wire});
  }
  fold(c, me, x, out, part(me), part(me + 1) - part(me));
  std::vector<Part> parts;
  std::vector<Expected> expected;
  parts.reserve(size_t(n));
  for (int k = 1; k < n; k++) {
    const int from = (me + k) % n;
    queue(c.site, c.group[size_t(from)], {out, part(me), part(me + 1) - part(me), c.wire});
    parts.emplace_back(c.wire, out, part(from), part(from + 1) - part(from));
    expected.push_back({c.group[size_t(from)], &parts.back()});
  }
  exchange(c.site, expected, c.wire);
}

void Communicator::all_gather(const Collective& c, Block x, Block out, bool tokens) {
  const int me = index_in(c), n = int(c.group.size());
  Place::Columns columns{out, std::vector<int64_t>(size_t(n), -1)};
  columns.widths[size_t(me)] = x.cols;
  std::vector<Place> sinks;
  std::vector<Expected> expected;
  sinks.reserve(size_t(n));
  for (int k = 1; k < n; k++) {
    const int peer = (me + k) % n;
    queue(c.site, c.group[size_t(peer)], {x, 0, x.values(), c.wire});
    sinks.push_back(tokens ? Place(c.wire, share_of(out, peer, n)) : Place(c.wire, &columns, peer));
    expected.push_back({c.group[size_t(peer)], &sinks.back()});
  }
  if (tokens) copy(c.wire, x, share_of(out, me, n));
  exchange(c.site, expected, c.wire);
  if (!tokens) copy(c.wire, x, out.columns_of(columns.before(me), x.cols));
}

void Communicator::reduce_scatter(const Collective& c, Block x, Block out) {
  const int me = index_in(c), n = int(c.group.size());
  for (int k = 1; k < n; k++) {
    const Block share = share_of(x, (me + k) % n, n);
    queue(c.site, c.group[size_t((me + k) % n)], {share, 0, share.values(), c.wire});
  }
  fold(c, me, share_of(x, me, n), out, 0, out.values());
}

void Communicator::all_to_all(const Collective& c, Block x, Block out) {
  const int me = index_in(c), n = int(c.group.size());
  Place::Columns columns{out, std::vector<int64_t>(size_t(n), -1)};
  columns.widths[size_t(me)] = x.cols;
  std::vector<Place> sinks;
  std::vector<Expected> expected;
  sinks.reserve(size_t(n));
  for (int k = 1; k < n; k++) {
    const int peer = (me + k) % n;
    const Block share = share_of(x, peer, n);
    queue(c.site, c.group[size_t(peer)], {share, 0, share.values(), c.wire});
    sinks.emplace_back(c.wire, &columns, peer);
    expected.push_back({c.group[size_t(peer)], &sinks.back()});
  }
  exchange(c.site, expected, c.wire);
  if (out.rows) copy(c.wire, share_of(x, me, n), out.columns_of(columns.before(me), x.cols));
}

namespace {
const std::string kMessages = "send";  // what a send and its recv share, whatever their sites
}

void Communicator::send(const std::string& site, int peer, Wire wire, Block x) {
  if (peer < 0 || peer >= ranks() || peer == rank_) fail(site, "it sends to rank " + std::to_string(peer) + " of " + std::to_string(ranks()));
  if (segment_->aborted()) stop(site, segment_->abort_reason().text());
  Peer& to = peers_[size_t(peer)];
  queue(kMessages, peer, {x, 0, x.values(), wire});
  guard(site, peer, [&] { push(to); });
  if (to.outbox.empty()) return;
  Message& m = to.outbox.back();  // x may change from now on
  m.own.resize(size_t(std::max<int64_t>(m.bytes(), 1)));
  m.from.encode(0, x.values(), m.own.data());
}

void Communicator::recv(const std::string& site, int peer, Wire wire, Block out) {
  if (peer < 0 || peer >= ranks() || peer == rank_) fail(site, "it receives from rank " + std::to_string(peer) + " of " + std::to_string(ranks()));
  Place sink(wire, out);
  std::vector<Expected> expected{{peer, &sink}};
  auto step = [&] {
    bool moved = push_all(site);
    guard(site, peer, [&] { moved |= pull(kMessages, expected[0], wire_bytes(wire)); });
    return Progress{moved, expected[0].over};
  };
  until(site, step, [&] { return "nothing came from rank " + std::to_string(peer); });
}

void Communicator::barrier(const std::string& site) {
  std::vector<Place> sinks(peers_.size(), Place(Wire::F32, Block{}));
  std::vector<Expected> expected;
  for (int i = 0; i < ranks(); i++) {
    if (i == rank_) continue;
    queue(site, i, {Block{}, 0, 0, Wire::F32});
    expected.push_back({i, &sinks[size_t(i)]});
  }
  exchange(site, expected, Wire::F32);
}

void Communicator::flush(const std::string& site) {
  if (all_sent(true)) return;
  until(site, [&] { return Progress{push_all(site), all_sent(true)}; }, [&] {
    for (int i = 0; i < ranks(); i++)
      if (!peers_[size_t(i)].outbox.empty()) return "rank " + std::to_string(i) + " took nothing";
    return std::string("nothing moved");
  });
}

}  // namespace intaglio
