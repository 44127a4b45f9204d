// The CUDA runtime, or tests/emulation in its place, and what its errors become.
#pragma once

#include <stdexcept>
#include <string>

#ifdef MASKOPS_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace maskops {

// Throws what went wrong. The first words of a lack of memory are those of csrc/torch_abi.h: kernels take some where
// they are loaded, and for their stacks.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // an error that is told here is not to be found again by the next launch
  const char* kind = error == cudaErrorMemoryAllocation ? "maskops: out of memory: " : "maskops: ";
  throw std::runtime_error(kind + std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace maskops
