// A team of threads that runs one function together, with a barrier. Waiters spin briefly, then sleep, so that a
// second process on the machine does not stop the world.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace intaglio {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  int size() const { return size_; }
  // Runs f(id) on every thread, the caller as 0; returns when all are done.
  void run(const std::function<void(int)>& f);
  void barrier();

 private:
  void worker(int id);
  int size_;
  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> started_{0};
  alignas(64) std::atomic<uint32_t> passed_{0};
  alignas(64) std::atomic<int> arrived_{0};
};

}  // namespace intaglio
