// Memory of kernels: allocated before a team of threads starts, so that a task cannot fail.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace maskops {

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

// Aligned to a cache line, and never of no bytes. Throws std::bad_alloc.
inline Memory allocate(size_t bytes) {
  auto* memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + (bytes == 0 ? 64 : 0)));
  if (memory == nullptr) throw std::bad_alloc();
  return Memory(memory);
}

// Huge pages for memory that nobody touched yet, where the system grants them. A hint: failing costs time only.
inline void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(memory), static_cast<void>(bytes);
#endif
}

// Memory for megabytes that are read again and again, aligned to a huge page.
inline Memory allocate_huge(size_t bytes) {
  constexpr size_t page = size_t{1} << 21;
  const size_t whole = (bytes + page - 1) / page * page;
  auto* memory = static_cast<char*>(std::aligned_alloc(page, whole));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, whole);
  return Memory(memory);
}

// One scratch buffer for each worker.
inline std::vector<Memory> scratch_for(int workers, size_t bytes) {
  std::vector<Memory> scratch;
  for (int i = 0; i < workers; i++) scratch.push_back(allocate(bytes));
  return scratch;
}

}  // namespace maskops
