// Bindings of cross-entropy.
#include "cross_entropy.h"

#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/cross_entropy.h"

namespace maskops {
namespace {

// A label per row, -1 in rows to skip. Reads the target, so that a label outside the vocabulary is an error and never
// an address. The message is that of check_labels in rows.py.
template <class T>
std::vector<int32_t> labels_of(const Tensor& target, int64_t vocabulary, int64_t ignore_index) {
  const T* values = target.data_or_null<const T>();
  const int64_t n_rows = target.size(0), stride = target.stride(0);
  std::vector<int32_t> labels(static_cast<size_t>(n_rows));
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t label = values[row * stride];
    if (label != ignore_index && (label < 0 || label >= vocabulary)) {
      throw std::invalid_argument(
          "target: the label that row " + std::to_string(row) + " of the logits is scored against is " +
          std::to_string(label) + ", outside the vocabulary of " + std::to_string(vocabulary) +
          ". Rows to skip hold ignore_index (" + std::to_string(ignore_index) + ") or are masked");
    }
    labels[static_cast<size_t>(row)] = label == ignore_index ? -1 : static_cast<int32_t>(label);
  }
  return labels;
}

// Holds what CrossEntropyRows points to.
struct LabelledRows {
  std::vector<int32_t> labels;
  CrossEntropyRows rows;

  LabelledRows(const Tensor& logits, const Tensor& target, const Tensor& class_weights, const Tensor& probabilities,
               bool shift, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
               double logit_scale) {
    rows = cross_entropy_rows(logits, target, class_weights, probabilities, shift, label_smoothing, z_loss, softcap,
                              logit_scale);
    labels = target.dtype() == DType::int32 ? labels_of<int32_t>(target, logits.size(1), ignore_index)
                                            : labels_of<int64_t>(target, logits.size(1), ignore_index);
    rows.labels = labels.data();
    require(rows.n_probability_rows == rows.n_rows || !is_soft(rows) || labels.back() < 0,
            "cross_entropy: under shift the last row has no next one and must be skipped");
  }
};

// What the forward pass makes; the last three may be of no rows.
struct RowScores {
  Tensor loss, lse, logprobs, entropy, argmax, statistics;

  RowScores(const CrossEntropyRows& rows, bool want_entropy, bool want_argmax) {
    const auto per_row = [&](bool wanted, DType dtype) { return Tensor::empty({wanted ? rows.n_rows : 0}, dtype); };
    loss = per_row(true, DType::float32);
    lse = per_row(true, DType::float32);
    logprobs = per_row(true, DType::float32);
    entropy = per_row(want_entropy, DType::float32);
    argmax = per_row(want_argmax, DType::int64);
    statistics = Tensor::empty({has_statistics(rows) ? rows.n_rows : 0, N_ROW_STATISTICS}, DType::float64);
  }
  CrossEntropyForward of(const CrossEntropyRows& rows) const {
    return {rows,
            loss.data<float>(),
            lse.data<float>(),
            logprobs.data<float>(),
            entropy.data_or_null<float>(),
            argmax.data_or_null<int64_t>(),
            statistics.data_or_null<double>()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& logits, const Tensor& target, const Tensor& class_weights, const Tensor& probabilities, bool shift,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale, bool entropy,
    bool argmax) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  RowScores scores(labelled.rows, entropy, argmax);
  if (labelled.rows.n_rows > 0) cross_entropy_forward(scores.of(labelled.rows), torch_threads());
  return {std::move(scores.loss),    std::move(scores.lse),    std::move(scores.logprobs),
          std::move(scores.entropy), std::move(scores.argmax), std::move(scores.statistics)};
}

// Memory for a gradient: that of the logits, row by row, or other memory of the same shape.
void require_gradient_memory(const Tensor& grad_logits, const Tensor& logits) {
  require(grad_logits.dtype() == logits.dtype() && grad_logits.dim() == 2 && grad_logits.size(0) == logits.size(0) &&
              grad_logits.size(1) == logits.size(1) && (logits.size(1) == 1 || grad_logits.stride(1) == 1),
          "cross_entropy: a buffer for the gradient must have the shape and dtype of logits, and contiguous columns");
  require_distinct_rows(grad_logits);
  require(reinterpret_cast<uintptr_t>(grad_logits.data()) % bytes_of(grad_logits.dtype()) == 0,
          "cross_entropy: a buffer for the gradient must be aligned to its elements");
  const auto end = [](const Tensor& x) {
    const int64_t elements = x.numel() == 0 ? 0 : (x.size(0) - 1) * x.stride(0) + x.size(1);
    return x.data<char>() + elements * bytes_of(x.dtype());
  };
  const bool apart = end(grad_logits) <= logits.data<char>() || end(logits) <= grad_logits.data<char>();
  require(apart || (grad_logits.data() == logits.data() && grad_logits.stride(0) == logits.stride(0)),
          "cross_entropy: a buffer for the gradient must be the logits themselves or share no memory with them");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_both_into_cpu(
    const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs, const Tensor& grad_entropy,
    const Tensor& logits, const Tensor& target, const Tensor& class_weights, const Tensor& probabilities,
    const Tensor& grad_logits, bool shift, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
    double logit_scale, bool entropy, bool argmax) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  require_gradient_memory(grad_logits, logits);
  RowScores scores(labelled.rows, entropy || grad_entropy.numel() != 0, argmax);
  if (labelled.rows.n_rows > 0) {
    cross_entropy_both(
        scores.of(labelled.rows),
        cross_entropy_backward_of(labelled.rows, grad_loss, grad_lse, grad_logprobs, grad_entropy, scores.lse,
                                  scores.logprobs, scores.entropy, scores.statistics, grad_logits, nullptr),
        torch_threads());
  }
  return {std::move(scores.loss), std::move(scores.lse), std::move(scores.logprobs), std::move(scores.entropy),
          std::move(scores.argmax)};
}

void cross_entropy_backward_into(const Tensor& grad_logits, void* grad_probabilities, const Tensor& grad_loss,
                                 const Tensor& grad_lse, const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                 const LabelledRows& labelled, const Tensor& lse, const Tensor& logprobs,
                                 const Tensor& entropy, const Tensor& statistics) {
  const CrossEntropyBackward p =
      cross_entropy_backward_of(labelled.rows, grad_loss, grad_lse, grad_logprobs, grad_entropy, lse, logprobs, entropy,
                                statistics, grad_logits, grad_probabilities);
  if (is_soft(p.rows)) {
    // They name the column to read, so they are not trusted either.
    for (int64_t row = 0; row < p.rows.n_rows; row++) {
      const double pivot = p.statistics[row * N_ROW_STATISTICS + PIVOT];
      require(pivot >= 0.0 && pivot < static_cast<double>(p.rows.vocabulary),
              "cross_entropy: lse, logprobs, entropy and statistics must be those of the forward pass");
    }
  }
  if (p.rows.n_rows > 0) cross_entropy_backward(p, torch_threads());
}

std::tuple<Tensor, Tensor> cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& grad_lse,
                                                      const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                                      const Tensor& logits, const Tensor& target,
                                                      const Tensor& class_weights, const Tensor& probabilities,
                                                      const Tensor& lse, const Tensor& logprobs, const Tensor& entropy,
                                                      const Tensor& statistics, bool shift, bool probabilities_grad,
                                                      int64_t ignore_index, double label_smoothing, double z_loss,
                                                      double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  const CrossEntropyRows& rows = labelled.rows;
  Tensor grad_logits = Tensor::empty({rows.n_rows, rows.vocabulary}, logits.dtype());
  const bool wanted = probabilities_grad && is_soft(rows);
  Tensor grad_probabilities = Tensor::empty({wanted ? rows.n_rows : 0, rows.vocabulary}, probabilities.dtype());
  char* first = nullptr;
  if (wanted && rows.n_rows > 0) {
    const int64_t element = bytes_of(rows.probability_element);
    first = static_cast<char*>(grad_probabilities.data());
    if (shift) {  // no row is scored against the first
      std::memset(first, 0, static_cast<size_t>(rows.vocabulary * element));
      first += rows.vocabulary * element;
    }
  }
  cross_entropy_backward_into(grad_logits, first, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse,
                              logprobs, entropy, statistics);
  return {std::move(grad_logits), std::move(grad_probabilities)};
}

void cross_entropy_backward_inplace_cpu(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                                        const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                                        const Tensor& class_weights, const Tensor& probabilities, const Tensor& lse,
                                        const Tensor& logprobs, const Tensor& entropy, const Tensor& statistics,
                                        bool shift, int64_t ignore_index, double label_smoothing, double z_loss,
                                        double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  require_distinct_rows(logits);
  cross_entropy_backward_into(logits, nullptr, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse,
                              logprobs, entropy, statistics);
}

void cross_entropy_backward_into_cpu(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                                     const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                                     const Tensor& class_weights, const Tensor& probabilities, const Tensor& lse,
                                     const Tensor& logprobs, const Tensor& entropy, const Tensor& statistics,
                                     const Tensor& grad_logits, bool shift, int64_t ignore_index,
                                     double label_smoothing, double z_loss, double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  require_gradient_memory(grad_logits, logits);
  cross_entropy_backward_into(grad_logits, nullptr, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse,
                              logprobs, entropy, statistics);
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&cross_entropy_forward_cpu>("cross_entropy_forward");
  library.implement<&cross_entropy_backward_cpu>("cross_entropy_backward");
  library.implement<&cross_entropy_backward_inplace_cpu>("cross_entropy_backward_");
  library.implement<&cross_entropy_backward_into_cpu>("cross_entropy_backward_into");
  library.implement<&cross_entropy_both_into_cpu>("cross_entropy_both_into");
  return true;
}();

}  // namespace
}  // namespace maskops
