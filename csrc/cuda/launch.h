// What every .cu file includes: CUDA, or tests/emulation, which compiles the same file as host code; and the launch of
// a kernel. No <<<>>> anywhere else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "runtime.h"

#ifndef MASKOPS_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A variable that the threads of a block share: MASKOPS_SHARED(float, sums, [32]) declares float sums[32]. Under
// emulation it holds NaN at the start of every block.
#define MASKOPS_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// The bytes that the launch asked for, aligned to 16.
#define MASKOPS_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace maskops {

// A block has 48 KiB for what it asks for and for the variables of its kernel together; more has to be allowed. What is
// allowed stays with the kernel, for all threads of the process: so it is always all that the device has.
constexpr size_t SHARED_BYTES_WITHOUT_ASKING = 32 << 10;

inline void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= SHARED_BYTES_WITHOUT_ASKING) return;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "reading what a kernel shares");
  int device = 0, most = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "reading a device");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes)),
             "asking for shared memory");
}

#ifndef MASKOPS_EMULATION

// Puts kernel(arguments...) on a stream. Throws what the launch says; what the kernel itself does wrong shows later, at
// the next call that waits for the device.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), "launching a kernel");
}

#else

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*, Arguments... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  emulation::launch(kernel, grid, block, shared_bytes, arguments...);
}

#endif

// A block each.
inline dim3 grid_of(int64_t blocks) {
  if (blocks < 1 || blocks > INT32_MAX)
    throw std::invalid_argument("maskops: the call needs more blocks than a launch has");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace maskops
