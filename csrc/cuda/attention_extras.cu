// Gradients that are sums over rows: of a bias that is broadcast, of slopes, of sinks. Each element has one block,
// which adds in one order.
#include "attention_gradient.cuh"

namespace maskops {
namespace {

__host__ __device__ inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// A block for each 64 x 64 elements of a head of the bias; along a dimension that it is broadcast over, one for all.
__global__ void __launch_bounds__(THREADS) bias_kernel(DeviceAttentionBackward p) {
  MASKOPS_DYNAMIC_SHARED(bytes);
  TileMemory& memory = *reinterpret_cast<TileMemory*>(bytes);
  const DeviceAttention& call = p.call;
  const AttentionShape& shape = call.shape;
  const bool of_all_rows = p.bias_sizes[2] != shape.q_len, of_all_keys = p.bias_sizes[3] != shape.k_len;
  const int64_t bias_row_tiles = of_all_rows ? 1 : tiles_of(shape.q_len, ROWS);
  const int64_t bias_key_tiles = of_all_keys ? 1 : tiles_of(shape.k_len, KEYS);
  int64_t index = blockIdx.x;
  const int64_t key_tile = index % bias_key_tiles;
  index /= bias_key_tiles;
  const int64_t row_tile = index % bias_row_tiles;
  index /= bias_row_tiles;
  const int64_t bias_head = index % p.bias_sizes[1], bias_batch = index / p.bias_sizes[1];
  const bool of_all_heads = p.bias_sizes[1] != shape.heads, of_all_batch = p.bias_sizes[0] != shape.batch;
  const int64_t last_batch = of_all_batch ? shape.batch : bias_batch + 1;
  const int64_t last_head = of_all_heads ? shape.heads : bias_head + 1;
  const int64_t last_row_tile = of_all_rows ? tiles_of(shape.q_len, ROWS) : row_tile + 1;
  const int64_t last_key_tile = of_all_keys ? tiles_of(shape.k_len, KEYS) : key_tile + 1;
  const int mine = tile_row(), part = tile_part();
  float sums[PART] = {};
  for (int64_t batch = bias_batch; batch < last_batch; batch++) {
    for (int64_t head = bias_head; head < last_head; head++) {
      const int64_t kv_head = head / (shape.heads / shape.kv_heads);
      for (int64_t row_at = row_tile; row_at < last_row_tile; row_at++) {
        const auto begin = static_cast<int32_t>(row_at * ROWS);
        const auto left = static_cast<int32_t>(shape.q_len) - begin;
        const RowTile tile{batch, head, begin, left < ROWS ? left : ROWS};
        RowState row = read_row(call, tile);
        const AttentionRowGradient of_row = read_gradient(p, row);
        for (int64_t key_at = key_tile; key_at < last_key_tile; key_at++) {
          const auto base = static_cast<int32_t>(key_at * KEYS), first = base + part * PART;
          __syncthreads();
          read_valid_keys(call, batch, base, memory.valid);
          __syncthreads();
          const uint64_t keys = memory.valid[0] | static_cast<uint64_t>(memory.valid[1]) << 32;
          const uint32_t allowed = allowed_keys(call, row, first, valid_part(memory));
          if (__syncthreads_or(allowed != 0) == 0) continue;
          const uint64_t rows = tile.count == ROWS ? ~uint64_t{0} : (uint64_t{1} << tile.count) - 1;
          multiply_rows(call, {call.q, false, batch, head, begin, rows}, {call.k, false, batch, kv_head, base, keys},
                        shape.head_dim, memory, memory.scores);
          multiply_rows(call, {p.grad_out, false, batch, head, begin, rows},
                        {call.v, false, batch, kv_head, base, keys}, shape.value_dim, memory, memory.slopes);
          __syncthreads();
          const uint32_t kept = allowed == 0 ? 0 : kept_keys(call, row, first);
#pragma unroll
          for (int i = 0; i < PART; i++) {
            if ((allowed >> i & 1) == 0) continue;
            sums[i] += gradient_of(call, row, of_row, first + i, (kept >> i & 1) != 0,
                                   memory.scores[part * PART + i][mine], memory.slopes[part * PART + i][mine])
                           .score;
          }
        }
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PART; i++) memory.scores[part * PART + i][mine] = sums[i];
  __syncthreads();
  const int64_t of_head = (bias_batch * p.bias_sizes[1] + bias_head) * p.bias_sizes[2] * p.bias_sizes[3];
  const int64_t rows_here = of_all_rows ? 1 : shape.q_len - row_tile * ROWS;
  const int64_t keys_here = of_all_keys ? 1 : shape.k_len - key_tile * KEYS;
  for (int at = static_cast<int>(threadIdx.x); at < ROWS * KEYS; at += THREADS) {
    const int row = at / KEYS, key = at % KEYS;
    if (row >= rows_here || key >= keys_here) continue;
    float sum = 0.0f;
    for (int i = of_all_rows ? 0 : row; i < (of_all_rows ? ROWS : row + 1); i++) {
      for (int j = of_all_keys ? 0 : key; j < (of_all_keys ? KEYS : key + 1); j++) sum += memory.scores[j][i];
    }
    store_element(p.grad_bias, p.call.features.bias_element,
                  of_head + (row_tile * ROWS + row) * p.bias_sizes[3] + key_tile * KEYS + key, sum);
  }
}

// The sum of the rows of a head that share a number: all, those of a batch element, or those of a sequence.
__global__ void __launch_bounds__(THREADS)
    per_head_kernel(DeviceAttentionBackward p, const float* of_rows, PerHead shared, float* gradient) {
  MASKOPS_SHARED(float, sums, [THREADS]);
  const AttentionShape& shape = p.call.shape;
  const int64_t head = blockIdx.x % shape.heads, outer = blockIdx.x / shape.heads;
  const bool of_one_element = !shared.by_sequence && shared.outer > 1;
  const int64_t last = of_one_element ? outer + 1 : shape.batch;
  float sum = 0.0f;
  for (int64_t batch = of_one_element ? outer : 0; batch < last; batch++) {
    const float* rows = of_rows + (batch * shape.heads + head) * shape.q_len;
    const int32_t* ordinals = p.call.features.positions + 2 * p.call.features.positions_stride +
                              batch * p.call.features.positions_batch_stride;
    for (int64_t row = threadIdx.x; row < shape.q_len; row += THREADS) {
      if (!shared.by_sequence || clamped(ordinals[row], 0, static_cast<int32_t>(shared.outer) - 1) == outer) {
        sum += rows[row];
      }
    }
  }
  sums[threadIdx.x] = sum;
  for (int step = THREADS / 2; step > 0; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x == 0) gradient[outer * shape.heads + head] = sums[0];
}

}  // namespace

void attention_extras_cuda(const DeviceAttentionBackward& p, void* stream) {
  const AttentionShape& shape = p.call.shape;
  const bool of_all_rows = p.bias_sizes[2] != shape.q_len, of_all_keys = p.bias_sizes[3] != shape.k_len;
  const bool is_shared = of_all_rows || of_all_keys || p.bias_sizes[0] != shape.batch || p.bias_sizes[1] != shape.heads;
  if (p.grad_bias != nullptr && is_shared) {
    const int64_t tiles =
        (of_all_rows ? 1 : tiles_of(shape.q_len, ROWS)) * (of_all_keys ? 1 : tiles_of(shape.k_len, KEYS));
    const int64_t blocks = p.bias_sizes[0] * p.bias_sizes[1] * tiles;
    if (blocks > 0) launch(bias_kernel, grid_of(blocks), dim3(THREADS), sizeof(TileMemory), stream, p);
  }
  if (p.grad_slopes != nullptr) {
    const PerHead& slopes = p.call.features.alibi_slopes;
    launch(per_head_kernel, grid_of(slopes.outer * shape.heads), dim3(THREADS), 0, stream, p, p.row_grad_slopes, slopes,
           p.grad_slopes);
  }
  if (p.grad_sinks != nullptr) {
    launch(per_head_kernel, grid_of(shape.heads), dim3(THREADS), 0, stream, p, p.row_grad_sinks, p.call.features.sinks,
           p.grad_sinks);
  }
}

}  // namespace maskops
