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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& logits, const Tensor& target, const Tensor& class_weights, const Tensor& probabilities, bool shift,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, double logit_scale, bool entropy,
    bool argmax) {
  const LabelledRows labelled(logits, target, class_weights, probabilities, shift, ignore_index, label_smoothing,
                              z_loss, softcap, logit_scale);
  const auto per_row = [&](bool wanted, DType dtype) {
    return Tensor::empty({wanted ? labelled.rows.n_rows : 0}, dtype);
  };
  Tensor loss = per_row(true, DType::float32), lse = per_row(true, DType::float32);
  Tensor logprobs = per_row(true, DType::float32), uncertainty = per_row(entropy, DType::float32);
  Tensor highest = per_row(argmax, DType::int64);
  Tensor statistics =
      Tensor::empty({has_statistics(labelled.rows) ? labelled.rows.n_rows : 0, N_ROW_STATISTICS}, DType::float64);
  if (labelled.rows.n_rows > 0) {
    cross_entropy_forward(
        {labelled.rows, loss.data<float>(), lse.data<float>(), logprobs.data<float>(),
         uncertainty.data_or_null<float>(), highest.data_or_null<int64_t>(), statistics.data_or_null<double>()},
        torch_threads());
  }
  return {std::move(loss),        std::move(lse),     std::move(logprobs),
          std::move(uncertainty), std::move(highest), std::move(statistics)};
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
  advise_huge_pages(grad_logits, bytes_of(rows.element));
  const bool wanted = probabilities_grad && is_soft(rows);
  Tensor grad_probabilities = Tensor::empty({wanted ? rows.n_rows : 0, rows.vocabulary}, probabilities.dtype());
  char* first = nullptr;
  if (wanted && rows.n_rows > 0) {
    const int64_t element = bytes_of(rows.probability_element);
    advise_huge_pages(grad_probabilities, element);
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

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&cross_entropy_forward_cpu>("cross_entropy_forward");
  library.implement<&cross_entropy_backward_cpu>("cross_entropy_backward");
  library.implement<&cross_entropy_backward_inplace_cpu>("cross_entropy_backward_");
  return true;
}();

}  // namespace
}  // namespace maskops
