#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace maskops {
namespace {

std::vector<const KernelTable*> runnable() {
  std::vector<const KernelTable*> tables{&baseline_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) tables.push_back(&avx2_kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&avx512_kernels);
  }
#endif
  return tables;
}

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> list = runnable();
  return list;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{tables().back()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *active().load(std::memory_order_relaxed); }

bool select_instruction_set(const char* name) {
  for (const KernelTable* table : tables()) {
    if (std::strcmp(table->name, name) == 0) {
      active().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

const char* instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const KernelTable* table : tables()) joined += (joined.empty() ? "" : " ") + std::string(table->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace maskops
