// Plain parameters of cross-entropy: no torch, host and device. See maskops/ops/cross_entropy/reference.py.
#pragma once

#include <cstdint>

#include "element.h"

namespace maskops {

// What both passes read. Row r starts at logits + r * row_stride (in elements); the columns of a row are contiguous.
struct CrossEntropyRows {
  const void* logits;
  Element element;
  int64_t n_rows;
  int64_t vocabulary;
  int64_t row_stride;
  const int32_t* labels;  // n_rows; in [0, vocabulary), or -1: the row is skipped and none of its logits is read
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  double logit_scale;
};

// Every output has n_rows values and is written for every row: 0 (argmax: -1) where the row is skipped.
struct CrossEntropyForward {
  CrossEntropyRows rows;
  float* loss;
  float* lse;
  float* logprobs;
  float* entropy;   // nullptr: not wanted
  int64_t* argmax;  // nullptr: not wanted
  float* columns;   // how many columns are above -inf: what the label smoothing spreads over; nullptr: no smoothing
};

// An incoming gradient, one value a row; stride 0 where one value serves them all, values nullptr where there is none.
struct RowGradient {
  const float* values;
  int64_t stride;
  double at(int64_t row) const { return values == nullptr ? 0.0 : values[row * stride]; }
};

struct CrossEntropyBackward {
  CrossEntropyRows rows;
  RowGradient grad_loss;
  RowGradient grad_lse;
  RowGradient grad_logprobs;
  RowGradient grad_entropy;
  const float* lse;  // lse, logprobs, entropy, columns: outputs of the forward pass
  const float* logprobs;
  const float* entropy;
  const float* columns;
  void* grad_logits;  // may be the logits themselves
  int64_t grad_row_stride;
};

}  // namespace maskops
