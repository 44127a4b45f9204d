// Bindings of cross-entropy.
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/cross_entropy.h"
#include "tensors.h"

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
    require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < INT32_MAX,
            "cross_entropy: logits must have 2 dimensions and 1 to 2^31 - 2 columns");
    require(logits.size(1) == 1 || logits.stride(1) == 1, "cross_entropy: the columns of logits must be contiguous");
    require(target.dim() == 1 && target.size(0) == logits.size(0), "cross_entropy: target must have a label per row");
    require(target.dtype() == DType::int32 || target.dtype() == DType::int64,
            "cross_entropy: target must be int32 or int64");
    labels = target.dtype() == DType::int32 ? labels_of<int32_t>(target, logits.size(1), ignore_index)
                                            : labels_of<int64_t>(target, logits.size(1), ignore_index);
    rows = {};
    rows.logits = logits.data();
    rows.element = element_of(logits);
    rows.n_rows = logits.size(0);
    rows.vocabulary = logits.size(1);
    rows.row_stride = logits.stride(0);
    rows.labels = labels.data();
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
    if (probabilities.dim() != 2) return;
    require(probabilities.size(0) == rows.n_rows && probabilities.size(1) == rows.vocabulary,
            "cross_entropy: probabilities must have the shape of logits");
    require(rows.vocabulary == 1 || probabilities.stride(1) == 1,
            "cross_entropy: the columns of probabilities must be contiguous");
    rows.probability_element = element_of(probabilities);
    rows.probability_row_stride = probabilities.stride(0);
    rows.n_probability_rows = rows.n_rows;
    const char* first = static_cast<const char*>(probabilities.data());
    if (shift && rows.n_rows > 0) {
      // Row r is scored against row r + 1.
      require(labels.back() < 0, "cross_entropy: under shift the last row has no next one and must be skipped");
      first += rows.probability_row_stride * bytes_of(rows.probability_element);
      rows.n_probability_rows--;
    }
    rows.probabilities = first;
  }

  bool soft() const { return rows.probabilities != nullptr; }
  bool has_statistics() const { return soft() || rows.label_smoothing != 0.0; }
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
      Tensor::empty({labelled.has_statistics() ? labelled.rows.n_rows : 0, N_ROW_STATISTICS}, DType::float64);
  if (labelled.rows.n_rows > 0) {
    cross_entropy_forward(
        {labelled.rows, loss.data<float>(), lse.data<float>(), logprobs.data<float>(),
         uncertainty.data_or_null<float>(), highest.data_or_null<int64_t>(), statistics.data_or_null<double>()},
        torch_threads());
  }
  return {std::move(loss),        std::move(lse),     std::move(logprobs),
          std::move(uncertainty), std::move(highest), std::move(statistics)};
}

// Where the gradients go: new tensors, or the logits; grad_probabilities may be nullptr.
void cross_entropy_backward_into(const Tensor& grad_logits, void* grad_probabilities, const Tensor& grad_loss,
                                 const Tensor& grad_lse, const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                 const LabelledRows& labelled, const Tensor& lse, const Tensor& logprobs,
                                 const Tensor& entropy, const Tensor& statistics) {
  const int64_t n_rows = labelled.rows.n_rows;
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
              statistics.size(0) == (labelled.has_statistics() ? n_rows : 0) &&
              (statistics.size(0) <= 1 || statistics.stride(0) == N_ROW_STATISTICS) &&
              (statistics.size(0) == 0 || statistics.stride(1) == 1),
          "cross_entropy: lse, logprobs, entropy and statistics must be those of the forward pass");
  const double* row_statistics = statistics.data_or_null<const double>();
  if (labelled.soft()) {
    // They name the column to read, so they are not trusted either.
    for (int64_t row = 0; row < n_rows; row++) {
      const double pivot = row_statistics[row * N_ROW_STATISTICS + PIVOT];
      require(pivot >= 0.0 && pivot < static_cast<double>(labelled.rows.vocabulary),
              "cross_entropy: lse, logprobs, entropy and statistics must be those of the forward pass");
    }
  }
  const CrossEntropyBackward p{
      labelled.rows,          gradient(grad_loss), gradient(grad_lse),    gradient(grad_logprobs),
      gradient(grad_entropy), saved(lse, true),    saved(logprobs, true), saved(entropy, grad_entropy.numel() != 0),
      row_statistics,         grad_logits.data(),  grad_logits.stride(0), grad_probabilities};
  if (n_rows > 0) cross_entropy_backward(p, torch_threads());
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
  const bool wanted = probabilities_grad && labelled.soft();
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
  require(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
          "cross_entropy: rows of logits that overlap in memory cannot hold their gradients");
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
