// Plain parameters of span attention: no torch, host and device. Row i of batch element b attends to the keys j with
// start[s][b][i] <= j < end[s][b][i] for some span s, where key_valid[b][j] is not 0. See maskops/spans.py.
#pragma once

#include <cstdint>

#include "element.h"

namespace maskops {

// A (batch, heads, rows, width) tensor whose last dimension is contiguous. Strides count elements.
struct StridedRows {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct Spans {
  const int32_t* start;
  const int32_t* end;
  const uint8_t* key_valid;
  // (n_tiles, tile_width): batch, first row, rows, cost, then lo, full_lo, full_hi, hi of each span
  const int32_t* tiles;
  int64_t span_stride, batch_stride, key_valid_batch_stride;  // batch strides are 0 where one plan serves every batch
  int32_t n_spans, n_tiles, tile_width, plan_batch;
};

struct AttentionShape {
  Element element;
  int64_t batch, heads, kv_heads, q_len, k_len, head_dim, value_dim;
  float softmax_scale, softcap;  // softcap 0 is off
};

struct AttentionForward {
  AttentionShape shape;
  Spans spans;
  StridedRows q, k, v, out;
  float* lse;  // (batch, heads, q_len)
};

struct AttentionBackward {
  AttentionShape shape;
  Spans spans;
  StridedRows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const float* lse;
  const float* grad_lse;  // (batch, heads, q_len), nullptr where the log-sum-exp was not used
};

}  // namespace maskops
