// The pass of a tile of rows over its keys: maximum and sum of their scores, and what the weights make of the values.
// Forward runs it, and backward, without values, for rows whose log-sum-exp is too coarse.
#pragma once

#include "attention_tile.cuh"

namespace maskops {

// Maximum and sum of the exponentials of a row's scores; a row without a key has -inf and 0. The four threads of a row
// hold the same.
struct RowSum {
  float maximum, sum;
};

// The result is that of weights exp(score - maximum), dropped and scaled by dropout; CHUNKS 0 leaves the values out.
template <int CHUNKS>
__device__ RowSum attend_rows(const DeviceAttention& p, const RowTile& tile, const RowState& row,
                              [[maybe_unused]] const Columns& columns, TileMemory& memory, Result<CHUNKS>& result) {
  const int mine = tile_row(), part = tile_part();
  const int64_t kv_head = tile.head / (p.shape.heads / p.shape.kv_heads);
  const uint64_t rows = tile.count == ROWS ? ~uint64_t{0} : (uint64_t{1} << tile.count) - 1;
  RowSum total{-INFINITY, 0.0f};
  __syncthreads();
  if (threadIdx.x == 0) memory.next_key = NO_KEY;
  __syncthreads();
  if (part == 0) atomicMin(&memory.next_key, next_key(p, row, 0));
  __syncthreads();
  for (int32_t base = memory.next_key; base < p.shape.k_len;) {
    read_valid_keys(p, tile.batch, base, memory.valid);
    __syncthreads();
    if (threadIdx.x == 0) {
      memory.next_key = NO_KEY;
      memory.seen_keys[0] = memory.seen_keys[1] = 0;
    }
    const int32_t first = base + part * PART;
    uint32_t allowed = allowed_keys(p, row, first, valid_part(memory));
    __syncthreads();
    if (allowed != 0) atomicOr(&memory.seen_keys[part / 2], allowed << part % 2 * PART);
    if (part == 0) atomicMin(&memory.next_key, next_key(p, row, base + KEYS));
    __syncthreads();
    const uint64_t seen = memory.seen_keys[0] | static_cast<uint64_t>(memory.seen_keys[1]) << 32;
    const int32_t key_base = base;
    base = memory.next_key;
    if (seen == 0) continue;
    multiply_rows(p, {p.q, false, tile.batch, tile.head, tile.first, rows},
                  {p.k, p.in_cache, tile.batch, kv_head, key_base, seen}, p.shape.head_dim, memory, memory.scores);
    __syncthreads();

    // The features of a score are code enough to have it once.
    float maximum = -INFINITY;
#pragma unroll 1
    for (int i = 0; i < PART; i++) {
      if ((allowed >> i & 1) == 0) continue;
      float& score = memory.scores[part * PART + i][mine];
      float bend;
      bool is_allowed = true;
      score = score_of(p, row, first + i, score, bend, is_allowed);
      if (!is_allowed) allowed &= ~(1u << i);
      maximum = fmaxf(maximum, score);
    }
    memory.part_maximum[part][mine] = maximum;
    __syncthreads();
    maximum = total.maximum;
#pragma unroll
    for (int i = 0; i < PARTS; i++) maximum = fmaxf(maximum, memory.part_maximum[i][mine]);
    // Until a row has seen a key there is nothing to rescale.
    const float rescale = maximum == -INFINITY ? 1.0f : expf(total.maximum - maximum);
    const uint32_t kept = CHUNKS > 0 && allowed != 0 ? kept_keys(p, row, first) : 0;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < PART; i++) {
      float& score = memory.scores[part * PART + i][mine];
      const float weight = (allowed >> i & 1) != 0 ? expf(score - maximum) : 0.0f;
      sum += weight;
      score = (kept >> i & 1) != 0 ? weight * p.features.kept_scale : 0.0f;
    }
    memory.part_sum[part][mine] = sum;
    if (part == 0) memory.factor[mine] = rescale;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PARTS; i++) sum += memory.part_sum[i][mine];
    total = {maximum, total.sum * rescale + sum};
    if constexpr (CHUNKS > 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float factor = memory.factor[piece_row() + i];
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
          for (int j = 0; j < 4; j++) result.values[chunk][i][j] *= factor;
        }
      }
      add_over<Over::keys>(p, memory.scores, {p.v, p.in_cache, tile.batch, kv_head, key_base, seen}, columns, memory,
                           result);
    }
  }
  return total;
}

}  // namespace maskops
