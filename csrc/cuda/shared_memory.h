// Shared memory of a block beyond what every launch may have.
#pragma once

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

#include "runtime.h"

namespace maskops {

// A block has 48 KiB for what it asks for and for the variables of its kernel together; more has to be allowed. What is
// allowed stays with the kernel on this device, for all threads of the process: so it is always all that the device
// has, and is asked for once.
constexpr size_t SHARED_BYTES_WITHOUT_ASKING = 32 << 10;

inline void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= SHARED_BYTES_WITHOUT_ASKING) return;
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "reading what a kernel shares");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "reading a device");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes)),
             "asking for shared memory");
  allowed.insert({kernel, device});
}

}  // namespace maskops
