// dK and dV of span attention: a block has a tile of keys and walks the rows that see it, of every head of its group,
// in one order: no atomics, the same bits each time. Blocks for dV and blocks for dK make the scores twice, and hold
// half the numbers each.
#include "attention_gradient.cuh"

namespace maskops {
namespace {

// The first row from `from` on that may see a key tile.
__device__ int32_t next_row(const DeviceAttention& p, int64_t batch, int32_t key_tile, int32_t n_tiles, int32_t from) {
  const auto q_len = static_cast<int32_t>(p.shape.q_len);
  if (p.spans.key_tiles == nullptr) return from;
  const int64_t plan = p.spans.plan_batch == 1 ? 0 : batch;
  int32_t next = q_len;
  for (int32_t s = 0; s < p.spans.n_spans; s++) {
    const int32_t* bounds =
        p.spans.key_tiles + 4 * ((s * static_cast<int64_t>(p.spans.plan_batch) + plan) * n_tiles + key_tile);
    const int32_t low = clamped(bounds[0], from, q_len), high = clamped(bounds[3], from, q_len);
    if (low < high && low < next) next = low;
  }
  return next;
}

template <int CHUNKS>
__global__ void __launch_bounds__(THREADS) keys_kernel(DeviceAttentionBackward p) {
  MASKOPS_DYNAMIC_SHARED(bytes);
  TileMemory& memory = *reinterpret_cast<TileMemory*>(bytes);
  const DeviceAttention& call = p.call;
  const AttentionShape& shape = call.shape;
  const auto n_tiles = static_cast<int32_t>((shape.k_len + KEYS - 1) / KEYS);
  int64_t index = blockIdx.x;
  const int64_t key_groups = groups_of(shape.head_dim), groups = key_groups + groups_of(shape.value_dim);
  int64_t group = index % groups;
  index /= groups;
  const bool is_values = group >= key_groups;
  if (is_values) group -= key_groups;
  const int64_t kv_head = index % shape.kv_heads, batch = index / shape.kv_heads % shape.batch;
  const auto key_tile = static_cast<int32_t>(index / shape.kv_heads / shape.batch);
  const Columns columns{static_cast<int32_t>(group) * GROUP,
                        static_cast<int32_t>(is_values ? shape.value_dim : shape.head_dim)};
  const int64_t shared_by = shape.heads / shape.kv_heads;
  const int mine = tile_row(), part = tile_part();
  const int32_t base = key_tile * KEYS, first = base + part * PART;
  read_valid_keys(call, batch, base, memory.valid);
  __syncthreads();
  const uint32_t valid = valid_part(memory);
  const uint64_t keys = memory.valid[0] | static_cast<uint64_t>(memory.valid[1]) << 32;
  Result<CHUNKS> result{};
  for (int64_t head = kv_head * shared_by; keys != 0 && head < (kv_head + 1) * shared_by; head++) {
    for (int32_t begin = 0;;) {
      begin = next_row(call, batch, key_tile, n_tiles, begin);
      if (begin >= shape.q_len) break;
      const int32_t left = static_cast<int32_t>(shape.q_len) - begin;
      const RowTile tile{batch, head, begin, left < ROWS ? left : ROWS};
      begin += tile.count;
      RowState row = read_row(call, tile);
      const AttentionRowGradient of_row = read_gradient(p, row);
      const uint32_t allowed = allowed_keys(call, row, first, valid);
      __syncthreads();
      if (threadIdx.x == 0) memory.seen_rows[0] = memory.seen_rows[1] = 0;
      __syncthreads();
      if (allowed != 0) atomicOr(&memory.seen_rows[mine / 32], 1u << mine % 32);
      __syncthreads();
      const uint64_t seen = memory.seen_rows[0] | static_cast<uint64_t>(memory.seen_rows[1]) << 32;
      if (seen == 0) continue;
      const Operand queries{call.q, false, batch, head, tile.first, seen};
      const Operand gradients{p.grad_out, false, batch, head, tile.first, seen};
      const Operand rows = is_values ? gradients : queries;
      multiply_rows(call, queries, {call.k, false, batch, kv_head, base, keys}, shape.head_dim, memory, memory.scores);
      if (!is_values) {
        multiply_rows(call, gradients, {call.v, false, batch, kv_head, base, keys}, shape.value_dim, memory,
                      memory.slopes);
      }
      __syncthreads();
      const uint32_t kept = allowed == 0 ? 0 : kept_keys(call, row, first);
#pragma unroll 1
      for (int i = 0; i < PART; i++) {
        float& score = memory.scores[part * PART + i][mine];
        PairGradient gradient{};
        if ((allowed >> i & 1) != 0) {
          const float grad_weight = is_values ? 0.0f : memory.slopes[part * PART + i][mine];
          gradient = gradient_of(call, row, of_row, first + i, (kept >> i & 1) != 0, score, grad_weight);
        }
        score = is_values ? gradient.weight : gradient.product;
      }
      add_over<Over::rows>(call, memory.scores, rows, columns, memory, result);
    }
  }
  const float scale = is_values ? 1.0f : shape.softmax_scale;
  const DeviceRows gradient = is_values ? p.grad_v : p.grad_k;
  const int32_t left = static_cast<int32_t>(shape.k_len) - base;
  store_rows(shape.element, gradient, {batch, kv_head, base, left < KEYS ? left : KEYS}, columns,
             {scale, scale, scale, scale}, result);
}

}  // namespace

void attention_keys_cuda(const DeviceAttentionBackward& p, void* stream) {
  const AttentionShape& shape = p.call.shape;
  const int64_t groups = groups_of(shape.head_dim) + groups_of(shape.value_dim);
  const int64_t blocks = groups * shape.batch * shape.kv_heads * ((shape.k_len + KEYS - 1) / KEYS);
  if (blocks == 0) return;
  const int64_t width = shape.head_dim > shape.value_dim ? shape.head_dim : shape.value_dim;
  if (width <= COLUMNS)
    launch(keys_kernel<1>, grid_of(blocks), dim3(THREADS), sizeof(TileMemory), stream, p);
  else if (width <= 2 * COLUMNS)
    launch(keys_kernel<2>, grid_of(blocks), dim3(THREADS), sizeof(TileMemory), stream, p);
  else
    launch(keys_kernel<4>, grid_of(blocks), dim3(THREADS), sizeof(TileMemory), stream, p);
}

}  // namespace maskops
