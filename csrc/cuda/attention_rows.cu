// What the backward pass needs to know of each row: the maximum and the logarithm of the sum of its scores, delta, the
// share of its keys beside a sink, and what it adds to the gradient of the sink.
#include "attention_gradient.cuh"
#include "attention_softmax.cuh"

namespace maskops {
namespace {

constexpr int WARP = 32;

// A log-sum-exp of this size (a row in which a bias of -1e9 stands for -inf everywhere) is a float32 too coarse for the
// logarithm in it: exp(s - lse) would be 1 where it is 1 / n, and from here on it is off by more than 4e-6. Such rows
// take the maximum and the sum of their scores anew.
constexpr float LARGE_LSE = 64.0f;

// The sum of dO * O of the rows of a tile, in memory.factor. A warp takes a row at a time.
template <class T>
__device__ void sum_products(const DeviceAttentionBackward& p, const RowTile& tile, TileMemory& memory) {
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  for (int mine = static_cast<int>(threadIdx.x) / WARP; mine < tile.count; mine += THREADS / WARP) {
    const T* out = row_of<T>(p.call, p.out, false, tile.batch, tile.head, tile.first + mine);
    const T* grad = row_of<T>(p.call, p.grad_out, false, tile.batch, tile.head, tile.first + mine);
    float sum = 0.0f;
    for (int64_t d = lane; d < p.call.shape.value_dim; d += WARP) sum += to_float(out[d]) * to_float(grad[d]);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) memory.factor[mine] = sum;
  }
}

__global__ void __launch_bounds__(THREADS) rows_kernel(DeviceAttentionBackward p) {
  MASKOPS_DYNAMIC_SHARED(bytes);
  TileMemory& memory = *reinterpret_cast<TileMemory*>(bytes);
  const DeviceAttention& call = p.call;
  RowTile tile;
  if (!find_rows(call, blockIdx.x, tile)) return;
  const RowState row = read_row(call, tile);
  switch (call.shape.element) {
    case Element::float32: sum_products<float>(p, tile, memory); break;
    case Element::bfloat16: sum_products<__nv_bfloat16>(p, tile, memory); break;
    case Element::float16: sum_products<__half>(p, tile, memory); break;
  }
  __syncthreads();
  const float product = row.used ? memory.factor[tile_row()] : 0.0f;
  const int64_t at = row_index(call, row);
  const float lse = row.used ? p.lse[at] : -INFINITY;
  const bool is_large = fabsf(lse) >= LARGE_LSE && fabsf(lse) != INFINITY;
  RowSum sum{lse, 1.0f};
  if (__syncthreads_or(is_large)) {
    Result<0> nothing;
    const RowSum anew = attend_rows<0>(call, tile, row, {}, memory, nothing);
    if (is_large) sum = anew;
  }
  if (!row.used || tile_part() != 0) return;
  const bool is_empty = lse == -INFINITY;
  float share = 1.0f, grad_sink = 0.0f;
  if (call.features.sinks.data != nullptr) {
    const float sink = per_head(call.features.sinks, 0, tile.head);
    share = 1.0f / (1.0f + expf(sink - lse));
    grad_sink = -product / (1.0f + expf(lse - sink));
  }
  const float grad_lse = p.grad_lse == nullptr ? 0.0f : p.grad_lse[at];
  p.row_maximum[at] = is_empty ? INFINITY : sum.maximum;
  p.row_log_sum[at] = is_empty ? 0.0f : logf(sum.sum);
  p.row_delta[at] = is_empty ? 0.0f : product * share - grad_lse;
  p.row_share[at] = is_empty ? 0.0f : share;
  if (p.row_grad_sinks != nullptr) p.row_grad_sinks[at] = is_empty ? 0.0f : grad_sink;
}

}  // namespace

void attention_rows_cuda(const DeviceAttentionBackward& p, void* stream) {
  launch(rows_kernel, grid_of(row_tiles(p.call)), dim3(THREADS), sizeof(TileMemory), stream, p);
}

void attention_backward_cuda(const DeviceAttentionBackward& p, void* stream) {
  attention_rows_cuda(p, stream);
  attention_queries_cuda(p, stream);
  attention_keys_cuda(p, stream);
  attention_extras_cuda(p, stream);
}

}  // namespace maskops
