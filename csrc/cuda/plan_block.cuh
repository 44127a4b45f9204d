// What the launches of build_plan share: their scratch, and what the threads of a block find together.
#pragma once

#include "launch.h"
#include "plan.h"

namespace maskops {
namespace plan_kernels {

using Kind = PlanLayout::Kind;
using Op = PlanStep::Op;

constexpr int FAR = INT32_MAX;
constexpr int ROWS = static_cast<int>(tile_rows);
constexpr int KEYS = static_cast<int>(key_tile);
constexpr int WINDOW = 1024;  // threads of a block at most
constexpr int WARPS = WINDOW / 32;
constexpr int MASK_ROWS = 32, MASK_KEYS = 1024;  // of a dense mask, that a block reads
constexpr int SUMMARY = 8;  // runs, least and greatest start, least and greatest end, live rows, rows

// ---- scratch, in this order ----

__host__ __device__ inline int own_rows(const DevicePlan& p) { return p.window - ROWS; }
__host__ __device__ inline int64_t rows_of(const DevicePlan& p) { return static_cast<int64_t>(p.batch) * p.q_len; }
__host__ __device__ inline int64_t blocks_of_rows(const DevicePlan& p) {
  return static_cast<int64_t>(p.batch) * p.row_blocks;
}
__host__ __device__ inline int64_t blocks_of_keys(const DevicePlan& p) {
  return static_cast<int64_t>(p.batch) * p.key_blocks;
}
__host__ __device__ inline int64_t run_plane(const DevicePlan& p) {
  return p.n_spans * blocks_of_rows(p) * own_rows(p);
}
// Of a block of keys: for each 32 of them which are holes and how many holes of the block lie before; then all holes.
__host__ __device__ inline int64_t holes_width(const DevicePlan& p) { return 2 * (p.window / 32) + 1; }
// A ticket counter and two halves for the sorted items, first of all.
__host__ __device__ inline int64_t sort_size(const DevicePlan& p) {
  return 1 + (p.result.order == nullptr ? 0 : 2 * static_cast<int64_t>(p.capacity));
}
__device__ inline int32_t* chain_of(const DevicePlan& p, int plane) {
  return p.scratch + sort_size(p) + plane * rows_of(p);
}
__device__ inline int32_t* runs_of(const DevicePlan& p, int plane) { return chain_of(p, 3) + plane * run_plane(p); }
__device__ inline int32_t* summary_of(const DevicePlan& p) { return runs_of(p, 4); }
__device__ inline int32_t* holes_of(const DevicePlan& p) {
  return summary_of(p) + p.n_spans * blocks_of_rows(p) * SUMMARY;
}

// ---- what the threads of a block find together ----

__device__ inline int block_scan(int value, int& total) {
  MASKOPS_SHARED(int, sums, [WARPS]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(~0u, value, static_cast<unsigned>(distance));
    if (lane >= distance) value += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = value;
  __syncthreads();
  total = 0;
  for (int other = 0; other < warps; other++) {
    if (other == warp) value += total;
    total += sums[other];
  }
  return value;
}

template <class T>
__device__ inline T warp_max(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(~0u, value, lanes);
    value = value > other ? value : other;
  }
  return value;
}

__device__ inline int block_max(int value) {
  MASKOPS_SHARED(int, tops, [WARPS]);
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; warp++) value = value > tops[warp] ? value : tops[warp];
  return value;
}

__device__ inline int warp_min(int value) { return -warp_max(-value); }
__device__ inline int block_min(int value) { return -block_max(-value); }
// ---- the launches ----

void launch_mask(const DevicePlanMask& mask, void* stream);
void launch_rows(const DevicePlan& p, void* stream);
void launch_lists(const DevicePlan& p, void* stream);

}  // namespace plan_kernels
}  // namespace maskops
