// One rank's end of a group of ranks: collectives on float32 rows, over channels.
//
// Results are bit for bit those of devices/mesh.py's run_collective(): values are rounded to `wire` before they travel,
// sums are taken in the order of the group and rounded to `wire` before they are handed out. all_reduce runs one of two
// schedules of src/intaglio/collectives, both of which sum in that order: one_shot, where every rank sends its whole input
// to every other, or two_shot, where each rank sums one part and sends the sum to all others.
//
// Every message carries the group's epoch and a sequence number. Messages of an earlier epoch are dropped. Every wait ends
// at a deadline, or when the group is aborted; it then throws CommunicatorError. A rank that fails aborts the group. Any two
// ranks must run the collectives and messages in which both take part in the same order; another order is an error.
// Only one thread may use a communicator at a time.
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/segment.h"

namespace intaglio {

// rank: whose communicator failed. site: of the collective. cause: why, naming the rank that aborted the group if another
// did.
struct CommunicatorError : std::runtime_error {
  CommunicatorError(int rank, const std::string& site, const std::string& cause)
      : std::runtime_error("rank " + std::to_string(rank) + " at " + site + ": " + cause), rank(rank), site(site), cause(cause) {}
  int rank;
  std::string site, cause;
};

enum class Wire { F32, BF16, F16 };
constexpr int64_t wire_bytes(Wire wire) { return wire == Wire::F32 ? 4 : 2; }

// Values [rows, cols] with `ld` between rows.
struct Block {
  float* data = nullptr;
  int64_t rows = 0, cols = 0, ld = 0;
  int64_t values() const { return rows * cols; }
  Block rows_of(int64_t first, int64_t count) const { return {data + first * ld, count, cols, ld}; }
  Block columns_of(int64_t first, int64_t count) const { return {data + first, rows, count, ld}; }
};

// What all_reduce adds to the sum over ranks: `total` = `values` + the sum. Nothing if total.data is null.
struct Addition {
  Block values, total;
};

// What all ranks of a collective agree on. group: ranks in ascending order, this one among them.
struct Collective {
  std::string site;
  std::vector<int> group;
  Wire wire = Wire::F32;
};

enum class AllReduceAlgorithm { Automatic, OneShot, TwoShot };

class Communicator {
 public:
  // peers: a channel to each rank; null for this one, and for ranks of this host, which are reached through the segment.
  Communicator(std::shared_ptr<Segment> segment, int rank, std::vector<std::unique_ptr<Channel>> peers);
  // All ranks on this host.
  Communicator(std::shared_ptr<Segment> segment, int rank);

  Communicator(const Communicator&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return int(peers_.size()); }
  // Seconds that one collective may wait for the others.
  double timeout = 300;
  AllReduceAlgorithm algorithm = AllReduceAlgorithm::Automatic;
  // Ranks of each host, if host h has the ranks h * ranks_per_host and following; the same on all ranks. 0: not known.
  int ranks_per_host = 0;
  // Called again and again while a collective or message waits, with turn = 0, 1, 2, ... until it sleeps; may be empty.
  std::function<void(int64_t turn)> idle;

  // x and out must not overlap. Shapes as the ops of the same name have them (src/intaglio/ops/collective.py).
  void all_reduce(const Collective& c, Block x, Block out) { all_reduce(c, x, out, {}); }
  // With an addition, which needs adds_on_arrival(), `out` is left with what is no result. `total` may be where x is.
  void all_reduce(const Collective& c, Block x, Block out, const Addition& more);
  // True if an all_reduce of so many values can add something to the sum in the pass in which it takes the last summand.
  bool adds_on_arrival(const Collective& c, int64_t values) const { return c.wire == Wire::F32 && c.group.size() > 1 && !two_shot(c, values); }
  void all_gather(const Collective& c, Block x, Block out, bool tokens);
  void reduce_scatter(const Collective& c, Block x, Block out);
  void all_to_all(const Collective& c, Block x, Block out);
  // Waits for nobody: what does not fit the channel is copied, and sent during later calls.
  void send(const std::string& site, int peer, Wire wire, Block x);
  void recv(const std::string& site, int peer, Wire wire, Block out);
  void barrier(const std::string& site);
  // Waits until everything sent has left this process.
  void flush(const std::string& site);

  // Aborts the group for all ranks, and throws.
  [[noreturn]] void fail(const std::string& site, const std::string& cause);
  Segment& segment() { return *segment_; }

 private:
  struct Header {
    uint64_t magic, epoch, sequence, bytes, site;
    uint64_t unused[3];
  };
  static_assert(sizeof(Header) == 64);
  // A run of a block's values in row order, encoded for a wire.
  struct Flat {
    Block block;
    int64_t first, count;
    Wire wire;
    void encode(int64_t at, int64_t n, uint8_t* to) const;
  };
  struct Message {  // to be sent: a header, values or bytes of its own, padding to a multiple of 64
    Header header;
    Flat from;
    std::vector<uint8_t> own;
    int64_t sent = -1;  // of its values' bytes; -1: not even the header
    int64_t bytes() const { return int64_t(header.bytes); }
    int64_t padding() const { return -bytes() & (kAlign - 1); }
  };
  // What becomes of a message's values. begin(): its length in bytes is known; throws invalid_argument if it is wrong.
  // ready(at): how many values may be taken from number `at` on.
  struct Sink {
    virtual ~Sink() = default;
    virtual void begin(int64_t bytes) = 0;
    virtual int64_t ready(int64_t at) = 0;
    virtual void take(const uint8_t* values, int64_t at, int64_t n) = 0;
  };
  struct Fold;
  struct Place;
  struct Part;
  struct Expected {
    int peer;
    Sink* sink;
    int64_t bytes = -1, taken = 0;  // bytes: -1: no header yet
    bool over = false;
  };
  struct Peer {
    std::unique_ptr<Channel> channel;
    std::deque<Message> outbox;
    uint64_t sent = 0, received = 0, dropping = 0;  // messages; bytes of a message of an earlier epoch still to come
  };

  struct Progress {
    bool moved, done;
  };

  void queue(const std::string& site, int peer, Flat from);
  bool push(Peer& peer);
  bool fill(Peer& peer);
  // Calls call(); what it throws fails the site, as the peer's fault.
  template <class Call>
  void guard(const std::string& site, int peer, Call call);
  bool pull(const std::string& site, Expected& e, int64_t value_bytes);
  // Returns when all that is expected has come, and all that was queued for anybody is on its way.
  void exchange(const std::string& site, std::vector<Expected>& expected, Wire wire);
  // Calls step() until it is done. waiting() says for what, in the error of a deadline.
  template <class Step, class Waiting>
  void until(const std::string& site, Step step, Waiting waiting);
  bool push_all(const std::string& site);
  bool all_sent(bool whole);
  void sleep(uint32_t seen, double seconds);
  [[noreturn]] void stop(const std::string& site, const std::string& cause);
  int index_in(const Collective& c);
  // Ranks of each host in a group of hosts between which all_reduce_in_chain() moves the fewest bytes; 0 for other groups.
  int ranks_of_hosts(const Collective& c) const;
  void all_reduce_in_chain(const Collective& c, int each, Block x, Block out);
  bool two_shot(const Collective& c, int64_t values) const;
  // How many of the values of x that were queued have left this block, for every peer.
  int64_t sent(const Block& x) const;
  // Sums the values first..first + count - 1 of everybody's x, as they come, into the same values of out.
  void fold(const Collective& c, int me, Block x, Block out, int64_t first, int64_t count, const Addition& more = {});

  std::shared_ptr<Segment> segment_;
  int rank_;
  std::vector<Peer> peers_;
  bool polled_ = false;  // some channel has a descriptor
};

}  // namespace intaglio
