// Forward pass of span attention in plain CUDA: float32 products from shared memory, for every card, dtype and mask.
#include "attention_softmax.cuh"

namespace maskops {
namespace {

template <int CHUNKS>
__global__ void __launch_bounds__(THREADS) forward_kernel(DeviceAttentionForward p) {
  MASKOPS_DYNAMIC_SHARED(bytes);
  TileMemory& memory = *reinterpret_cast<TileMemory*>(bytes);
  const DeviceAttention& call = p.call;
  const int64_t groups = groups_of(call.shape.value_dim), group = blockIdx.x % groups;
  const Columns columns{static_cast<int32_t>(group) * GROUP, static_cast<int32_t>(call.shape.value_dim)};
  RowTile tile;
  if (!find_rows(call, blockIdx.x / groups, tile)) return;
  const RowState row = read_row(call, tile);
  Result<CHUNKS> result{};
  const RowSum total = attend_rows<CHUNKS>(call, tile, row, columns, memory, result);

  __syncthreads();
  if (tile_part() == 0) {
    const RowEnd end = end_of_row(call, tile.head, total.maximum, total.sum);
    memory.factor[tile_row()] = end.factor;
    if (row.used && group == 0) {
      p.lse[(tile.batch * call.shape.heads + tile.head) * call.shape.q_len + row.row] = end.lse;
    }
  }
  __syncthreads();
  float factor[4];
#pragma unroll
  for (int i = 0; i < 4; i++) factor[i] = memory.factor[piece_row() + i];
  store_rows(call.shape.element, p.out, tile, columns, factor, result);
}

// The last of the ordinals of a plan: how many sequences each batch element that shares it counts on.
__global__ void count_kernel(const int32_t* ordinals, int64_t rows, int32_t* sequences) {
  MASKOPS_SHARED(int32_t, last, );
  if (threadIdx.x == 0) last = -1;
  __syncthreads();
  int32_t mine = -1;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) mine = max(mine, ordinals[row]);
  atomicMax(&last, mine);
  __syncthreads();
  if (threadIdx.x == 0) *sequences = last + 1;
}

}  // namespace

void attention_forward_cuda(const DeviceAttentionForward& p, void* stream) {
  const int64_t value_dim = p.call.shape.value_dim;
  const dim3 grid = grid_of(row_tiles(p.call) * groups_of(value_dim));
  if (value_dim <= COLUMNS)
    launch(forward_kernel<1>, grid, dim3(THREADS), sizeof(TileMemory), stream, p);
  else if (value_dim <= 2 * COLUMNS)
    launch(forward_kernel<2>, grid, dim3(THREADS), sizeof(TileMemory), stream, p);
  else
    launch(forward_kernel<4>, grid, dim3(THREADS), sizeof(TileMemory), stream, p);
}

void count_sequences_cuda(const int32_t* ordinals, int64_t rows, int32_t* sequences, void* stream) {
  launch(count_kernel, dim3(1), dim3(THREADS), 0, stream, ordinals, rows, sequences);
}

}  // namespace maskops
