// Memory: large allocations by mmap, anonymous or mapped from a file.
#pragma once
#include <cstdint>

namespace intaglio {

// Zeroed anonymous memory, or a file whose pages are shared with other processes that map it. Page-aligned; uses huge
// pages where the system offers them. Throws std::bad_alloc or std::system_error.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes);
  // offset: of the part of a file that is mapped; a multiple of the page size, and of 2 MiB for huge pages.
  Memory(int file, int64_t bytes, bool writable, int64_t offset = 0);
  ~Memory();
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  uint8_t* data() const { return data_; }
  int64_t size() const { return size_; }
  bool writable() const { return writable_; }
  // Ensures a size of at least `bytes`. If it was smaller, allocates 1.25 times `bytes` anew and discards the contents.
  void grow(int64_t bytes);
  // Gives the whole pages of a range back to the system: its contents are lost, or are those of the file.
  void drop(int64_t offset, int64_t bytes);

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
  bool writable_ = true;
};

constexpr int64_t kAlign = 64;  // bytes: a cache line
constexpr int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace intaglio
