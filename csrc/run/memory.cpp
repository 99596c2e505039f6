// Memory: mmap of anonymous memory and of files, aligned for huge pages.
#include "run/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <system_error>
#include <utility>

namespace intaglio {

namespace {
constexpr size_t kHuge = 2 << 20;

// mmap() at an address that is a multiple of the huge page size: a file's page cache can only be mapped in huge pages if
// address and file offset agree modulo their size. With 4 KiB pages a step that reads small matrices takes up to a fifth
// longer. Returns null and sets errno on failure.
uint8_t* map_aligned(size_t bytes, int protection, int flags, int file, int64_t offset = 0) {
  const size_t end = (bytes + 4095) / 4096 * 4096, slack = bytes < kHuge ? 0 : kHuge;
  void* reserved = mmap(nullptr, end + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return nullptr;
  uint8_t *from = static_cast<uint8_t*>(reserved), *at = from + (slack ? kHuge - reinterpret_cast<uintptr_t>(reserved) % kHuge : 0);
  if (at > from) munmap(from, size_t(at - from));
  if (from + slack > at) munmap(at + end, size_t(from + slack - at));
  if (mmap(at, bytes, protection, flags | MAP_FIXED, file, offset) == MAP_FAILED) {
    const int error = errno;
    munmap(at, end);
    errno = error;
    return nullptr;
  }
  if (slack) madvise(at, bytes, MADV_HUGEPAGE);
  return at;
}
}  // namespace

Memory::Memory(int64_t bytes) : size_(std::max<int64_t>(bytes, 1)) {
  data_ = map_aligned(size_t(size_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
  if (!data_) throw std::bad_alloc();
}
Memory::Memory(int file, int64_t bytes, bool writable, int64_t offset) : size_(bytes), writable_(writable) {
  data_ = map_aligned(size_t(size_), PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, file, offset);
  if (!data_) throw std::system_error(errno, std::generic_category(), "mapping a file of packed weights or of K/V cache");
  if (!writable) madvise(data_, size_t(size_), MADV_WILLNEED);
}
Memory::~Memory() {
  if (data_) munmap(data_, size_t(size_));
}
Memory::Memory(Memory&& other) noexcept { *this = std::move(other); }
Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(writable_, other.writable_);
  return *this;
}

void Memory::grow(int64_t bytes) {
  if (size_ < bytes) *this = Memory(bytes + bytes / 4);
}

void Memory::drop(int64_t offset, int64_t bytes) {
  const int64_t begin = (offset + 4095) / 4096 * 4096, end = (offset + bytes) / 4096 * 4096;
  if (end > begin) madvise(data_ + begin, size_t(end - begin), MADV_DONTNEED);
}

}  // namespace intaglio
