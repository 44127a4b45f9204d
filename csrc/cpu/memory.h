// Memory of kernels: allocated before a team of threads starts, so that a task cannot fail.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

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

// One scratch buffer for each worker.
inline std::vector<Memory> scratch_for(int workers, size_t bytes) {
  std::vector<Memory> scratch;
  for (int i = 0; i < workers; i++) scratch.push_back(allocate(bytes));
  return scratch;
}

}  // namespace maskops
