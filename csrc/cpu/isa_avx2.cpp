// Kernels for x86-64 with AVX2.
#if defined(__x86_64__)
#include "isa_prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VECTOR_BYTES 32
namespace maskops::avx2 {
#include "kernels.inc"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
namespace maskops {
const KernelTable avx2_kernels = MASKOPS_KERNEL_TABLE("avx2", avx2);
}
#endif
