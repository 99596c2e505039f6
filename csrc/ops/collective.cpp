// Collectives as ops of a step: what this rank exchanges with the others of its group, through the executable's communicator.
// One thread does it; a failure ends the step with CommunicatorError.
#include <algorithm>

#include "comm/communicator.h"
#include "comm/wire.h"
#include "run/op.h"

namespace intaglio {
namespace {

Block block_of(const Tensor& t) { return {t.row(0), t.rows(), t.cols, t.ld}; }

class CollectiveKernel : public OpKernel {
 public:
  explicit CollectiveKernel(OpArgs& a)
      : context_(a.context), site_(a.word("site")), wire_(a.choice<Wire>("wire", {{"f32", Wire::F32}, {"bf16", Wire::BF16}, {"f16", Wire::F16}})) {
    if (!a.context.communicator) throw std::invalid_argument("the host runs collectives itself only as a rank with a communicator");
    communicator_ = a.context.communicator;
  }
  void plan(Planner& p) override { p.single(0); }
  void set_next(const Work& next) override { next_ = &next; }

 protected:
  // Calls exchange(). While it waits, this thread prefetches weights of the next product, if no other thread would use them.
  template <class Exchange>
  void ahead(Exchange exchange) {
    struct Until {  // also if the exchange throws: the next op may not outlive this executable
      Communicator* communicator;
      ~Until() { communicator->idle = nullptr; }
    } until{communicator_};
    if (next_ && context_.threads == 1) communicator_->idle = [next = next_](int64_t turn) { next->fetch_ahead(0, turn); };
    exchange();
  }

  const Context& context_;
  std::string site_;
  Wire wire_;
  Communicator* communicator_;
  const Work* next_ = nullptr;
};

class GroupKernel : public CollectiveKernel {
 public:
  explicit GroupKernel(OpArgs& a) : CollectiveKernel(a), x_(a.rows("x")), out_(a.rows("out")), collective_{site_, {}, wire_} {
    for (int64_t rank : a.integers("group")) collective_.group.push_back(int(rank));
  }

 protected:
  const Tensor &x_, &out_;
  Collective collective_;
};

// With `total`, also the op after it: total = residual + out. Then out is not stored, unless it is tapped.
class AllReduce : public GroupKernel {
 public:
  enum Part { Exchange, ExchangeAndAdd, AddSlots, Add };
  explicit AllReduce(OpArgs& a)
      : GroupKernel(a), slots_(a.integer("slots")), residual_(a.optional_rows("residual")), total_(a.optional_rows("total")) {
    if (!residual_ != !total_) throw std::invalid_argument("a residual and the total with it are given together");
  }
  void plan(Planner& p) override {
    const bool at_once = total_ && slots_ == 1 && !p.tapped() && communicator_->adds_on_arrival(collective_, x_.rows() * x_.cols);
    p.single(at_once ? ExchangeAndAdd : Exchange);
    if (slots_ > 1) {
      p.workspace(x_.rows() * x_.cols * 4);
      p.phase(AddSlots, x_.rows(), p.chunk(x_.rows()));
    }
    if (total_ && !at_once) p.phase(Add, x_.rows(), p.chunk(x_.rows()));
  }
  void run(int part, int64_t begin, int64_t end, Scratch&) override {
    float* sums = reinterpret_cast<float*>(context_.workspace);  // over ranks, of all slots
    if (part == Exchange || part == ExchangeAndAdd) {
      const Block to = slots_ == 1 ? block_of(out_) : Block{sums, x_.rows(), x_.cols, x_.cols};
      const Addition more = part == Exchange ? Addition{} : Addition{block_of(*residual_), block_of(*total_)};
      return ahead([&] { communicator_->all_reduce(collective_, block_of(x_), to, more); });
    }
    for (int64_t t = begin; t < end; t++) {
      float* out = out_.row(t);
      const int64_t n = out_.cols;
      if (part == Add) {
        const float* residual = residual_->row(t);
        float* total = total_->row(t);
        for (int64_t i = 0; i < n; i++) total[i] = residual[i] + out[i];
        continue;
      }
      const float* from = sums + t * x_.cols;
      std::copy_n(from, n, out);
      for (int64_t j = 1; j < slots_; j++)
        for (int64_t i = 0; i < n; i++) out[i] += from[j * n + i];
      round_block(wire_, {out, 1, n, n}, 0, n);
    }
  }

 private:
  int64_t slots_;
  const Tensor *residual_, *total_;
};

// An op that another one does with its own; it keeps its number.
class Done : public OpKernel {
 public:
  explicit Done(OpArgs&) {}
  void plan(Planner&) override {}
  void run(int, int64_t, int64_t, Scratch&) override {}
};

class AllGather : public GroupKernel {
 public:
  explicit AllGather(OpArgs& a) : GroupKernel(a), tokens_(a.flag("tokens")) { a.ignore({"width"}); }
  void run(int, int64_t, int64_t, Scratch&) override {
    ahead([&] { communicator_->all_gather(collective_, block_of(x_), block_of(out_), tokens_); });
  }

 private:
  bool tokens_;
};

class ReduceScatter : public GroupKernel {
 public:
  explicit ReduceScatter(OpArgs& a) : GroupKernel(a) { a.ignore({"share"}); }
  void run(int, int64_t, int64_t, Scratch&) override { communicator_->reduce_scatter(collective_, block_of(x_), block_of(out_)); }
};

class AllToAll : public GroupKernel {
 public:
  explicit AllToAll(OpArgs& a) : GroupKernel(a) { a.ignore({"share", "width"}); }
  void run(int, int64_t, int64_t, Scratch&) override { communicator_->all_to_all(collective_, block_of(x_), block_of(out_)); }
};

class Send : public CollectiveKernel {
 public:
  explicit Send(OpArgs& a) : CollectiveKernel(a), x_(a.rows("x")), peer_(int(a.integer("peer"))) {}
  void run(int, int64_t, int64_t, Scratch&) override { communicator_->send(site_, peer_, wire_, block_of(x_)); }

 private:
  const Tensor& x_;
  int peer_;
};

class Recv : public CollectiveKernel {
 public:
  explicit Recv(OpArgs& a) : CollectiveKernel(a), out_(a.rows("out")), peer_(int(a.integer("peer"))) { a.ignore({"width", "rows"}); }
  void run(int, int64_t, int64_t, Scratch&) override { communicator_->recv(site_, peer_, wire_, block_of(out_)); }

 private:
  const Tensor& out_;
  int peer_;
};

const Registered<AllReduce> all_reduce("all_reduce");
const Registered<Done> done("done");
const Registered<AllGather> all_gather("all_gather");
const Registered<ReduceScatter> reduce_scatter("reduce_scatter");
const Registered<AllToAll> all_to_all("all_to_all");
const Registered<Send> send("send");
const Registered<Recv> recv("recv");

}  // namespace
}  // namespace intaglio
