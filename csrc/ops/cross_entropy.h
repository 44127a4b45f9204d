// What the bindings of cross-entropy share: tensors to plain parameters, whatever the device. Labels are the exception:
// the CPU reads them before its kernels do.
#pragma once

#include "../cross_entropy.h"
#include "tensors.h"

namespace maskops {

// All but the labels; under shift, row r is scored against row r + 1 of the probabilities.
inline CrossEntropyRows cross_entropy_rows(const Tensor& logits, const Tensor& target, const Tensor& class_weights,
                                           const Tensor& probabilities, bool shift, double label_smoothing,
                                           double z_loss, double softcap, double logit_scale) {
  require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < INT32_MAX,
          "cross_entropy: logits must have 2 dimensions and 1 to 2^31 - 2 columns");
  require(logits.size(1) == 1 || logits.stride(1) == 1, "cross_entropy: the columns of logits must be contiguous");
  require(target.dim() == 1 && target.size(0) == logits.size(0), "cross_entropy: target must have a label per row");
  require(target.dtype() == DType::int32 || target.dtype() == DType::int64,
          "cross_entropy: target must be int32 or int64");
  // Kernels hold it in both: there is a cap in both or in none.
  require(softcap == 0.0 || static_cast<float>(softcap) != 0.0f,
          "cross_entropy: softcap must be 0 or a float32 number");
  CrossEntropyRows rows = {};
  rows.logits = logits.data();
  rows.element = element_of(logits);
  rows.n_rows = logits.size(0);
  rows.vocabulary = logits.size(1);
  rows.row_stride = logits.stride(0);
  rows.label_smoothing = label_smoothing;
  rows.z_loss = z_loss;
  rows.softcap = softcap;
  rows.logit_scale = logit_scale;
  if (class_weights.numel() != 0) {
    require(class_weights.dim() == 1 && class_weights.dtype() == DType::float32 &&
                class_weights.size(0) == rows.vocabulary && (rows.vocabulary == 1 || class_weights.stride(0) == 1),
            "cross_entropy: class_weights must be float32, contiguous, one per column");
    rows.class_weights = class_weights.data<const float>();
  }
  if (probabilities.dim() != 2) return rows;
  require(probabilities.size(0) == rows.n_rows && probabilities.size(1) == rows.vocabulary,
          "cross_entropy: probabilities must have the shape of logits");
  require(rows.vocabulary == 1 || probabilities.stride(1) == 1,
          "cross_entropy: the columns of probabilities must be contiguous");
  rows.probability_element = element_of(probabilities);
  rows.probability_row_stride = probabilities.stride(0);
  rows.n_probability_rows = rows.n_rows;
  const char* first = static_cast<const char*>(probabilities.data());
  if (shift && rows.n_rows > 0) {
    first += rows.probability_row_stride * bytes_of(rows.probability_element);
    rows.n_probability_rows--;
  }
  rows.probabilities = first;
  return rows;
}

inline bool is_soft(const CrossEntropyRows& rows) { return rows.probabilities != nullptr; }
inline bool has_statistics(const CrossEntropyRows& rows) { return is_soft(rows) || rows.label_smoothing != 0.0; }

// Gradients that come in, and what the forward pass saved. Where the results go: new tensors, or the logits;
// grad_probabilities may be nullptr.
inline CrossEntropyBackward cross_entropy_backward_of(const CrossEntropyRows& rows, const Tensor& grad_loss,
                                                      const Tensor& grad_lse, const Tensor& grad_logprobs,
                                                      const Tensor& grad_entropy, const Tensor& lse,
                                                      const Tensor& logprobs, const Tensor& entropy,
                                                      const Tensor& statistics, const Tensor& grad_logits,
                                                      void* grad_probabilities) {
  const int64_t n_rows = rows.n_rows;
  const auto gradient = [&](const Tensor& tensor) {
    require(tensor.numel() == 0 || (tensor.dim() == 1 && tensor.size(0) == n_rows && tensor.dtype() == DType::float32),
            "cross_entropy: an incoming gradient must be float32 with a value per row");
    return RowGradient{tensor.data_or_null<float>(), tensor.stride(0)};
  };
  const auto saved = [&](const Tensor& tensor, bool needed) {
    require(tensor.dtype() == DType::float32 && tensor.dim() == 1 &&
                (tensor.size(0) == n_rows || (!needed && tensor.size(0) == 0)) &&
                (tensor.size(0) <= 1 || tensor.stride(0) == 1),
            "cross_entropy: lse, logprobs, entropy and statistics must be those of the forward pass");
    return tensor.data_or_null<const float>();
  };
  require(statistics.dtype() == DType::float64 && statistics.dim() == 2 && statistics.size(1) == N_ROW_STATISTICS &&
              statistics.size(0) == (has_statistics(rows) ? n_rows : 0) &&
              (statistics.size(0) <= 1 || statistics.stride(0) == N_ROW_STATISTICS) &&
              (statistics.size(0) == 0 || statistics.stride(1) == 1),
          "cross_entropy: lse, logprobs, entropy and statistics must be those of the forward pass");
  return {rows,
          gradient(grad_loss),
          gradient(grad_lse),
          gradient(grad_logprobs),
          gradient(grad_entropy),
          saved(lse, true),
          saved(logprobs, true),
          saved(entropy, grad_entropy.numel() != 0),
          statistics.data_or_null<const double>(),
          grad_logits.data(),
          grad_logits.stride(0),
          grad_probabilities};
}

inline void require_distinct_rows(const Tensor& logits) {
  require(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
          "cross_entropy: rows of logits that overlap in memory cannot hold their gradients");
}

}  // namespace maskops
