// What every .cu file includes: CUDA, or tests/emulation, which compiles the same file as host code; and the launch of
// a kernel. No <<<>>> anywhere else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "shared_memory.h"

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
