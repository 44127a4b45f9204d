// dQ of span attention: a block has a tile of rows and walks its keys. It also writes the gradient of a bias that has
// an element for every pair, and what each row adds to that of its slope.
#include "attention_gradient.cuh"
#include "device.h"

namespace maskops {
namespace {

template <int CHUNKS>
__global__ void __launch_bounds__(THREADS) queries_kernel(DeviceAttentionBackward p, bool writes_bias) {
  MASKOPS_DYNAMIC_SHARED(bytes);
  TileMemory& memory = *reinterpret_cast<TileMemory*>(bytes);
  const DeviceAttention& call = p.call;
  const int64_t groups = groups_of(call.shape.head_dim), group = blockIdx.x % groups;
  const Columns columns{static_cast<int32_t>(group) * GROUP, static_cast<int32_t>(call.shape.head_dim)};
  writes_bias = writes_bias && group == 0;
  RowTile tile;
  if (!find_rows(call, blockIdx.x / groups, tile)) return;
  RowState row = read_row(call, tile);
  const bool is_there = row.used;
  const AttentionRowGradient of_row = read_gradient(p, row);
  const int mine = tile_row(), part = tile_part();
  const int64_t kv_head = tile.head / (call.shape.heads / call.shape.kv_heads);
  const uint64_t rows = tile.count == ROWS ? ~uint64_t{0} : (uint64_t{1} << tile.count) - 1;
  Result<CHUNKS> result{};
  float grad_slope = 0.0f;
  if (threadIdx.x == 0) memory.next_key = NO_KEY;
  __syncthreads();
  if (part == 0) atomicMin(&memory.next_key, next_key(call, row, 0));
  __syncthreads();
  for (int32_t base = memory.next_key; base < call.shape.k_len;) {
    read_valid_keys(call, tile.batch, base, memory.valid);
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.next_key = NO_KEY;
      memory.seen_keys[0] = memory.seen_keys[1] = 0;
    }
    const int32_t first = base + part * PART;
    const uint32_t allowed = allowed_keys(call, row, first, valid_part(memory));
    __syncthreads();
    if (allowed != 0) atomicOr(&memory.seen_keys[part / 2], allowed << part % 2 * PART);
    if (part == 0) atomicMin(&memory.next_key, next_key(call, row, base + KEYS));
    __syncthreads();
    const uint64_t seen = memory.seen_keys[0] | static_cast<uint64_t>(memory.seen_keys[1]) << 32;
    const int32_t key_base = base;
    base = memory.next_key;
    if (seen == 0) continue;
    const Operand keys{call.k, false, tile.batch, kv_head, key_base, seen};
    multiply_rows(call, {call.q, false, tile.batch, tile.head, tile.first, rows}, keys, call.shape.head_dim, memory,
                  memory.scores);
    multiply_rows(call, {p.grad_out, false, tile.batch, tile.head, tile.first, rows},
                  {call.v, false, tile.batch, kv_head, key_base, seen}, call.shape.value_dim, memory, memory.slopes);
    __syncthreads();
    const uint32_t kept = allowed == 0 ? 0 : kept_keys(call, row, first);
#pragma unroll 1
    for (int i = 0; i < PART; i++) {
      float& slope = memory.slopes[part * PART + i][mine];
      PairGradient gradient{};
      if ((allowed >> i & 1) != 0) {
        gradient = gradient_of(call, row, of_row, first + i, (kept >> i & 1) != 0, memory.scores[part * PART + i][mine],
                               slope);
        if (writes_bias) {
          store_element(p.grad_bias, call.features.bias_element, row_index(call, row) * call.shape.k_len + first + i,
                        gradient.score);
        }
        if (p.row_grad_slopes != nullptr) grad_slope -= gradient.score * distance_of(row, first + i);
      }
      slope = gradient.product;
    }
    add_over<Over::keys>(call, memory.slopes, keys, columns, memory, result);
  }
  const float scale = call.shape.softmax_scale;
  store_rows(call.shape.element, p.grad_q, tile, columns, {scale, scale, scale, scale}, result);
  if (p.row_grad_slopes == nullptr) return;
  memory.part_sum[part][mine] = grad_slope;
  __syncthreads();
  if (part == 0 && group == 0 && is_there) {
    float sum = 0.0f;
    for (int i = 0; i < PARTS; i++) sum += memory.part_sum[i][mine];
    p.row_grad_slopes[row_index(call, row)] = sum;
  }
}

}  // namespace

void attention_queries_cuda(const DeviceAttentionBackward& p, void* stream) {
  const AttentionShape& shape = p.call.shape;
  const bool writes_bias = p.grad_bias != nullptr && p.bias_sizes[0] == shape.batch && p.bias_sizes[1] == shape.heads &&
                           p.bias_sizes[2] == shape.q_len && p.bias_sizes[3] == shape.k_len;
  if (writes_bias) {  // pairs that no tile visits
    const int64_t elements = shape.batch * shape.heads * shape.q_len * shape.k_len;
    clear_cuda(p.grad_bias, elements * bytes_of(p.call.features.bias_element), stream);
  }
  const dim3 grid = grid_of(row_tiles(p.call) * groups_of(shape.head_dim));
  if (shape.head_dim <= COLUMNS)
    launch(queries_kernel<1>, grid, dim3(THREADS), sizeof(TileMemory), stream, p, writes_bias);
  else if (shape.head_dim <= 2 * COLUMNS)
    launch(queries_kernel<2>, grid, dim3(THREADS), sizeof(TileMemory), stream, p, writes_bias);
  else
    launch(queries_kernel<4>, grid, dim3(THREADS), sizeof(TileMemory), stream, p, writes_bias);
}

}  // namespace maskops
