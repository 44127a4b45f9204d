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
  // n_rows; in [0, vocabulary), or -1: the row is skipped and none of its logits is read. With probabilities, any label
  // that is not -1 keeps the row and means nothing more.
  const int32_t* labels;
  const float* class_weights;  // vocabulary; nullptr: 1 for every column
  // Row r of the logits is scored against row r of these, whose columns are contiguous; nullptr: against its label.
  const void* probabilities;
  Element probability_element;
  int64_t probability_row_stride;
  int64_t n_probability_rows;  // the rows of the logits from this one on are skipped
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
  double logit_scale;
};

// What the forward pass finds out about a row for the backward pass. Sums leave out the pivot, the column whose
// exponential stays out of the others': the label, or the largest logit where the row is scored against probabilities.
enum RowStatistic {
  ALLOWED_COLUMNS,  // how many columns are above -inf: the label smoothing spreads over these
  ALLOWED_WEIGHT,   // the sum of their weights
  TARGET_WEIGHT,    // the sum of probability * weight
  TARGET_MASS,      // the sum of the probabilities
  PIVOT,            // only with probabilities: the column
  PIVOT_LOGPROB,    // and its log-probability
  N_ROW_STATISTICS
};

// Every output has n_rows values and is written for every row: 0 (argmax: -1) where the row is skipped.
struct CrossEntropyForward {
  CrossEntropyRows rows;
  float* loss;
  float* lse;
  float* logprobs;
  float* entropy;   // nullptr: not wanted
  int64_t* argmax;  // nullptr: not wanted
  // n_rows x N_ROW_STATISTICS; nullptr: neither label smoothing nor probabilities.
  double* statistics;
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
  const float* lse;  // lse, logprobs, entropy, statistics: outputs of the forward pass
  const float* logprobs;
  const float* entropy;
  const double* statistics;
  void* grad_logits;  // may be the logits themselves
  int64_t grad_row_stride;
  void* grad_probabilities;  // n_probability_rows x vocabulary, contiguous, of their element; nullptr: not wanted
};

}  // namespace maskops
