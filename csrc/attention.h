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

// A (batch, heads, q_len, k_len) tensor; a stride is 0 along a dimension that it is broadcast over.
struct Broadcast {
  void* data;  // nullptr where the call has none
  int64_t batch_stride, head_stride, row_stride, key_stride;
};

// One number for every head, or for every head of every batch element or sequence.
struct PerHead {
  const float* data;  // nullptr where the call has none
  int64_t outer_stride, head_stride;
  int64_t outer;     // batch elements or sequences; 1 where they share
  bool by_sequence;  // outer counts sequences: a row belongs to the one of its ordinal
};

// Which weights are dropped: those whose random word is at most last_dropped.
struct Dropout {
  bool is_on;
  uint32_t last_dropped;
  float scale;  // of what is kept, 1 / (1 - p)
  uint64_t seed;
  uint32_t sequences;  // of a plan that several batch elements share: each of them counts on from the one before
};

// What a call uses beyond spans and a softcap.
struct Features {
  Broadcast bias;  // a -inf in it hides the pair
  Element bias_element;
  Broadcast dense;  // bytes, 0 hides the pair
  PerHead alibi_slopes, sinks;
  Dropout dropout;
  // (3, batch, q_len): key aligned with the row, first key and ordinal of its sequence; nullptr where nothing needs it
  const int32_t* positions;
  int64_t positions_stride, positions_batch_stride;
};

struct AttentionForward {
  AttentionShape shape;
  Spans spans;
  Features features;
  StridedRows q, k, v, out;
  float* lse;  // (batch, heads, q_len)
};

struct AttentionBackward {
  AttentionShape shape;
  Spans spans;
  Features features;
  StridedRows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  const float* lse;
  const float* grad_lse;  // (batch, heads, q_len), nullptr where the log-sum-exp was not used
  // Gradients that are not wanted are nullptr. That of the bias is contiguous, in the bias's own sizes and element.
  void* grad_bias;
  int64_t bias_sizes[4];
  bool bias_is_shared;  // broadcast: an element of the bias belongs to several pairs
  float* grad_slopes;   // (outer, heads)
  float* grad_sinks;    // (heads,)
  // (batch, heads, q_len), what each row adds to its slope's and its sink's gradient; the schedule provides them.
  float *row_grad_slopes, *row_grad_sinks;
};

}  // namespace maskops
