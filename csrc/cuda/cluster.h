// Thread-block clusters (compute capability 9.0): blocks that run at the same time and write to each other's shared
// memory. Elsewhere, and under emulation, a cluster is one block.
#pragma once

#include "launch.h"

namespace maskops {

#ifdef MASKOPS_EMULATION
constexpr int LARGEST_CLUSTER = 1;
#else
constexpr int LARGEST_CLUSTER = 8;  // what every device with clusters can run
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
// Every thread of the cluster arrives, and waits for all others: what they wrote before they arrived is visible then.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// Writes to a shared variable of the block with this rank.
__device__ __forceinline__ void store_remote(uint32_t* variable, int rank, uint32_t word) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(variable));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

#else

__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ void store_remote(uint32_t* variable, int, uint32_t word) { *variable = word; }

#endif

// Puts a kernel on a stream in clusters of `size` blocks.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int64_t clusters, int size, int threads, size_t shared_bytes,
                     void* stream, Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(clusters * size)), block(static_cast<unsigned>(threads));
#ifndef MASKOPS_EMULATION
  if (size > 1) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "launching clusters of a kernel");
    return;
  }
#endif
  launch(kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace maskops
