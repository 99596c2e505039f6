// ShmChannel: a channel to a rank of the same host, over two rings of a segment.
#pragma once
#include <memory>

#include "comm/segment.h"

namespace intaglio {

class ShmChannel : public Channel {
 public:
  ShmChannel(std::shared_ptr<Segment> segment, int rank, int peer)
      : segment_(std::move(segment)), out_(segment_->ring(rank, peer)), in_(segment_->ring(peer, rank)),
        out_data_(segment_->ring_data(rank, peer)), in_data_(segment_->ring_data(peer, rank)),
        size_(uint64_t(segment_->ring_bytes())), peer_bell_(segment_->bell(peer)) {}

  Bytes space() override {
    const uint64_t head = out_.head.load(std::memory_order_relaxed), used = head - out_.tail.load();
    return {out_data_ + head % size_, size_t(std::min(size_ - used, size_ - head % size_))};
  }
  void commit(size_t count) override {
    out_.head.store(out_.head.load(std::memory_order_relaxed) + count);
    peer_bell_.ring();
  }
  Bytes arrived() override {
    const uint64_t tail = in_.tail.load(std::memory_order_relaxed), there = in_.head.load() - tail;
    return {in_data_ + tail % size_, size_t(std::min(there, size_ - tail % size_))};
  }
  void consume(size_t count) override {
    in_.tail.store(in_.tail.load(std::memory_order_relaxed) + count);
    peer_bell_.ring();
  }

 private:
  std::shared_ptr<Segment> segment_;
  Ring &out_, &in_;
  uint8_t *out_data_, *in_data_;
  uint64_t size_;
  Bell& peer_bell_;
};

}  // namespace intaglio
