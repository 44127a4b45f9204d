// The gradient of a tile of scores: P is made anew from the row's maximum and sum, and dS = P * (dP - delta) with
// delta = sum(dO * O) - d lse. A sink scales O by g = sigmoid(lse - sink), which adds (1 - g) sum(dO * O) to d lse:
// with g dO in the place of dO, delta = g sum(dO * O) - d lse. Dropout masks and scales P in dV and dP, and leaves
// delta.
#pragma once

#include "attention_tile.cuh"

namespace maskops {

// What a thread knows of its row beyond RowState.
struct AttentionRowGradient {
  float maximum, log_sum, delta, share;
};

__device__ inline int64_t row_index(const DeviceAttention& p, const RowState& row) {
  return (row.batch * p.shape.heads + row.head) * p.shape.q_len + row.row;
}

// Rows that see nothing count as rows that are not there: whatever arrives at them, nothing of them is read.
__device__ inline AttentionRowGradient read_gradient(const DeviceAttentionBackward& p, RowState& row) {
  if (!row.used) return {};
  const int64_t at = row_index(p.call, row);
  row.used = p.lse[at] != -INFINITY;
  return {p.row_maximum[at], p.row_log_sum[at], p.row_delta[at], p.row_share[at]};
}

// The gradient of one pair.
struct PairGradient {
  float weight;   // what multiplies dO in dV
  float score;    // dS, of the score with everything that was added to it
  float product;  // of the product of query and key but for softmax_scale
};

// From the products of a pair that is allowed. One that a bias of -inf hides has no gradient: it is selected, never
// multiplied by 0.
__device__ inline PairGradient gradient_of(const DeviceAttention& p, const RowState& row,
                                           const AttentionRowGradient& of_row, int32_t key, bool is_kept, float product,
                                           float grad_weight) {
  float bend;
  bool is_allowed = true;
  const float score = score_of(p, row, key, product, bend, is_allowed);
  if (!is_allowed) return {0.0f, 0.0f, 0.0f};
  const float weight = expf(score - of_row.maximum - of_row.log_sum);
  const float kept = is_kept ? weight * p.features.kept_scale * of_row.share : 0.0f;
  const float arriving = is_kept ? grad_weight * p.features.kept_scale * of_row.share : 0.0f;
  const float gradient = weight * (arriving - of_row.delta);
  return {kept, gradient, gradient * bend};
}

}  // namespace maskops
