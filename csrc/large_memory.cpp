#include "large_memory.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace maskops {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)

namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20;
constexpr int MOST_BLOCKS = 16;
constexpr size_t SHARE_OF_MEMORY = 16;  // what is kept is at most one part in so many of the machine's memory

struct Block {
  char* begin;  // nullptr: none
  size_t size;
};

Block kept[MOST_BLOCKS];  // the latest first
std::atomic_flag in_use = ATOMIC_FLAG_INIT;

// Access to `kept`, or none. Nobody waits for it: in a child that was forked while another thread had it, that would
// take for ever.
class Access {
 public:
  Access() : granted_(!in_use.test_and_set(std::memory_order_acquire)) {}
  ~Access() {
    if (granted_) in_use.clear(std::memory_order_release);
  }
  Access(const Access&) = delete;
  Access& operator=(const Access&) = delete;
  explicit operator bool() const { return granted_; }

 private:
  bool granted_;
};

size_t most_kept() {
  rlimit limit{};
  // Where address space is limited, kept blocks would be missing elsewhere.
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return 0;
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages <= 0 || page <= 0 ? 0 : static_cast<size_t>(pages) * static_cast<size_t>(page) / SHARE_OF_MEMORY;
}

void unmap(Block& block) {
  if (block.begin != nullptr) munmap(block.begin, block.size);
  block = {};
}

// The smallest that is large enough, but not more than twice as large: what a result does not touch stays available to
// the system, but it is address space.
Block take_kept(size_t size) {
  const Access access;
  if (!access) return {};
  Block* best = nullptr;
  for (Block& block : kept) {
    const bool fits = block.begin != nullptr && block.size >= size && block.size / 2 <= size;
    if (fits && (best == nullptr || block.size < best->size)) best = &block;
  }
  if (best == nullptr) return {};
  const Block found = std::exchange(*best, Block{});
  std::rotate(best, best + 1, kept + MOST_BLOCKS);
  return found;
}

Block map(size_t size) {
  void* mapped = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return {};
  char* begin = static_cast<char*>(mapped);
  const size_t ahead = (HUGE_PAGE - reinterpret_cast<uintptr_t>(begin) % HUGE_PAGE) % HUGE_PAGE;
  if (ahead > 0) munmap(begin, ahead);
  munmap(begin + ahead + size, HUGE_PAGE - ahead);
  madvise(begin + ahead, size, MADV_HUGEPAGE);  // a hint: failing costs time only
  return {begin + ahead, size};
}

}  // namespace

void* take_large(size_t bytes, size_t* size) {
  *size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  Block block = take_kept(*size);
  if (block.begin == nullptr) block = map(*size);
  *size = block.size;
  return block.begin;
}

void give_back_large(void* begin, size_t size) noexcept {
  Block left_over[1 + MOST_BLOCKS] = {{static_cast<char*>(begin), size}};
  const size_t most = most_kept();
  // Locked pages cannot be given up like this, so they are not kept.
  if (size <= most && madvise(begin, size, MADV_FREE) == 0) {
    const Access access;
    if (access) {
      for (Block& place : kept) std::swap(place, left_over[0]);  // the oldest is left over
      size_t total = 0;
      for (int i = 0; i < MOST_BLOCKS; i++) {
        total += kept[i].size;
        if (total <= most) continue;
        total -= kept[i].size;
        std::swap(kept[i], left_over[1 + i]);
      }
    }
  }
  // With access given up: gigabytes take long, and whoever has no access meanwhile neither keeps a block nor finds one.
  for (Block& block : left_over) unmap(block);
}

size_t release_large() noexcept {
  Block taken[MOST_BLOCKS] = {};
  {
    const Access access;
    if (access) std::swap(taken, kept);
  }
  size_t total = 0;
  for (Block& block : taken) {
    total += block.size;
    unmap(block);
  }
  return total;
}

#else

void* take_large(size_t, size_t* size) {
  *size = 0;
  return nullptr;
}
void give_back_large(void*, size_t) noexcept {}
size_t release_large() noexcept { return 0; }

#endif

}  // namespace maskops
