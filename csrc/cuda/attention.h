// Span attention on the device: what its kernels are given. Everything that depends on values, the number of work items
// and the seed of dropout among it, is read by the kernels.
#pragma once

#include <cstdint>

#include "../attention.h"
#include "decode.h"

namespace maskops {

// A (batch, heads, rows, width) tensor whose last dimension is contiguous. Strides count elements.
struct DeviceRows {
  char* data;
  int64_t batch_stride, head_stride, row_stride;
  bool sixteen;  // every row begins at a multiple of 16 bytes and is a multiple of 16 bytes long
};

struct DeviceSpans {
  const int32_t* start;  // nullptr: every row sees the keys of its limits
  const int32_t* end;
  const uint8_t* key_valid;                                   // nullptr with start
  int64_t span_stride, batch_stride, key_valid_batch_stride;  // batch strides are 0 where one plan serves every batch
  int32_t n_spans, plan_batch;
  // (capacity, tile_width): batch, first row, rows; nullptr: a plain grid over the rows
  const int32_t* tiles;
  const int32_t* tile_count;
  const int32_t* order;  // nullptr: as they lie
  int32_t capacity, tile_width;
  // (n_spans, plan_batch, key tiles, 4): rows from, -, -, to; nullptr: any row may see any key tile
  const int32_t* key_tiles;
};

struct DeviceFeatures {
  Broadcast bias;  // a -inf in it hides the pair
  Element bias_element;
  Broadcast dense;     // 0 hides the pair
  bool dense_is_bits;  // int32 words of 32 keys, strides in words; else bytes
  PerHead alibi_slopes, sinks;
  bool has_dropout;
  uint32_t last_dropped;
  float kept_scale;          // of what is kept, 1 / (1 - p)
  const int64_t* seed;       // nullptr without dropout
  const int32_t* sequences;  // of a plan that several batch elements share; nullptr: 0
  const int32_t* positions;  // (3, batch, q_len), nullptr where nothing needs it
  int64_t positions_stride, positions_batch_stride;
};

// Keys outside of [first, end) of their batch element are not there.
struct DeviceLimits {
  DeviceIntegers first, end;  // data is nullptr for 0, and for all keys
};

struct DeviceAttention {
  AttentionShape shape;
  DeviceSpans spans;
  DeviceFeatures features;
  DeviceLimits limits;
  DevicePlaces at;  // where keys and values lie, if in a cache
  bool in_cache;
  DeviceRows q, k, v;
};

struct DeviceAttentionForward {
  DeviceAttention call;
  DeviceRows out;
  float* lse;  // (batch, heads, q_len)
};

// Few queries over a cache. Shapes alone say how many splits of the keys there are, so that the same call gives the
// same bits.
struct DeviceDecode {
  DeviceAttentionForward forward;
  int32_t splits;
  float* parts;          // (splits, batch, heads, q_len, value_dim), scratch; nullptr for one split
  float *maxima, *sums;  // (splits, batch, heads, q_len), scratch
};

// Gradients that are not wanted are nullptr.
struct DeviceAttentionBackward {
  DeviceAttention call;
  DeviceRows out, grad_out, grad_q, grad_k, grad_v;
  const float* lse;
  const float* grad_lse;
  void* grad_bias;  // contiguous, in the sizes and the element of the bias
  int64_t bias_sizes[4];
  float* grad_slopes;  // (outer, heads)
  float* grad_sinks;   // (heads)
  // (batch, heads, q_len), scratch. P is exp(score - row_maximum - row_log_sum), dO counts times row_share.
  float *row_maximum, *row_log_sum, *row_delta, *row_share;
  float *row_grad_slopes, *row_grad_sinks;  // nullptr with grad_slopes and grad_sinks
};

void attention_forward_cuda(const DeviceAttentionForward& p, void* stream);
void decode_attention_cuda(const DeviceDecode& p, void* stream);
void attention_backward_cuda(const DeviceAttentionBackward& p, void* stream);
// Writes the sequences of a shared plan, its largest ordinal + 1, for dropout.
void count_sequences_cuda(const int32_t* ordinals, int64_t rows, int32_t* sequences, void* stream);

// The parts of the backward pass, each in a file of its own.
void attention_rows_cuda(const DeviceAttentionBackward& p, void* stream);     // the scratch of rows
void attention_queries_cuda(const DeviceAttentionBackward& p, void* stream);  // dQ, and the bias where it is not shared
void attention_keys_cuda(const DeviceAttentionBackward& p, void* stream);     // dK and dV
void attention_extras_cuda(const DeviceAttentionBackward& p, void* stream);   // bias where it is shared, slopes, sinks

}  // namespace maskops
