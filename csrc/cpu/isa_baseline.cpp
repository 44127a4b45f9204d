// Kernels for the instruction set that every processor of the architecture has: SSE2 on x86-64, NEON on 64-bit ARM.
#include "isa_prelude.h"

#define VECTOR_BYTES 16
namespace maskops::baseline {
#include "kernels.inc"
}
namespace maskops {
#if defined(__aarch64__)
const KernelTable baseline_kernels = MASKOPS_KERNEL_TABLE("neon", baseline);
#else
const KernelTable baseline_kernels = MASKOPS_KERNEL_TABLE("baseline", baseline);
#endif
}  // namespace maskops
