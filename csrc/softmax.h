// Plain parameters of the masked softmax: no torch, host and device. See maskops/ops/softmax/reference.py.
#pragma once

#include <cstdint>

#include "element.h"

namespace maskops {

constexpr int SOFTMAX_DIMENSIONS = 64;  // as many as torch's tensors have

// A tensor of the common shape: its strides, in elements, along the softmax, across the lanes and over the rest.
struct SoftmaxOperand {
  void* data;
  int64_t along;
  int64_t across;
  int64_t outer[SOFTMAX_DIMENSIONS];
};

// The common shape, seen as outer dimensions x length x lanes: `length` is the dimension of the softmax, the lanes lie
// side by side in the results, which are dense. lanes == 1: the softmax runs along the last dimension of the results.
struct SoftmaxShape {
  Element element;
  int64_t length;
  int64_t lanes;
  int64_t outer_count;
  int n_outer;
  int64_t outer_sizes[SOFTMAX_DIMENSIONS];
};

// Spans of a plan, with lanes == 1: outer index i is query row i % q_len of batch element i / rows_per_batch_element.
// What they hold is clamped where it is read.
struct SoftmaxSpans {
  const int32_t* start;  // nullptr: no spans
  const int32_t* end;
  const uint8_t* key_valid;
  const int64_t* valid_before;  // per batch element of the plan, length + 1 values: valid keys before each key
  int64_t span_stride;
  int64_t batch_stride;
  int64_t key_batch_stride;  // of key_valid
  int64_t n_spans;
  int64_t plan_batch;  // 1: one plan for every batch element
  int64_t q_len;
  int64_t rows_per_batch_element;
};

struct SoftmaxForward {
  SoftmaxShape shape;
  SoftmaxOperand x;
  SoftmaxOperand mask;  // one byte an element, not 0: visible; data nullptr: none
  SoftmaxOperand weights;
  SoftmaxSpans spans;
  float* lse;  // outer_count x lanes; nullptr: not wanted
};

// grad_x = w * (grad_weights - sum(w * grad_weights) + grad_lse), and 0 where w is 0, whatever the gradients hold
// there.
struct SoftmaxBackward {
  SoftmaxShape shape;
  SoftmaxOperand weights;
  SoftmaxOperand grad_weights;
  SoftmaxOperand grad_x;
  SoftmaxSpans spans;     // weights outside of them are 0 and are not read
  const float* grad_lse;  // outer_count x lanes; nullptr: none
};

}  // namespace maskops
