// Bindings of cross-entropy.
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

  LabelledRows(const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing, double z_loss,
               double softcap, double logit_scale) {
    require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < INT32_MAX,
            "cross_entropy: logits must have 2 dimensions and 1 to 2^31 - 2 columns");
    require(logits.size(1) == 1 || logits.stride(1) == 1, "cross_entropy: the columns of logits must be contiguous");
    require(target.dim() == 1 && target.size(0) == logits.size(0), "cross_entropy: target must have a label per row");
    require(target.dtype() == DType::int32 || target.dtype() == DType::int64,
            "cross_entropy: target must be int32 or int64");
    labels = target.dtype() == DType::int32 ? labels_of<int32_t>(target, logits.size(1), ignore_index)
                                            : labels_of<int64_t>(target, logits.size(1), ignore_index);
    rows = {logits.data(), element_of(logits), logits.size(0), logits.size(1), logits.stride(0),
            labels.data(), label_smoothing,    z_loss,         softcap,        logit_scale};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& logits, const Tensor& target, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap, double logit_scale, bool entropy, bool argmax) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  const auto per_row = [&](bool wanted, DType dtype) {
    return Tensor::empty({wanted ? labelled.rows.n_rows : 0}, dtype);
  };
  Tensor loss = per_row(true, DType::float32), lse = per_row(true, DType::float32);
  Tensor logprobs = per_row(true, DType::float32), uncertainty = per_row(entropy, DType::float32);
  Tensor highest = per_row(argmax, DType::int64), columns = per_row(label_smoothing != 0.0, DType::float32);
  if (labelled.rows.n_rows > 0) {
    cross_entropy_forward(
        {labelled.rows, loss.data<float>(), lse.data<float>(), logprobs.data<float>(),
         uncertainty.data_or_null<float>(), highest.data_or_null<int64_t>(), columns.data_or_null<float>()},
        torch_threads());
  }
  return {std::move(loss),        std::move(lse),     std::move(logprobs),
          std::move(uncertainty), std::move(highest), std::move(columns)};
}

// Where the gradient goes: a new tensor, or the logits.
void cross_entropy_backward_into(const Tensor& grad_logits, const Tensor& grad_loss, const Tensor& grad_lse,
                                 const Tensor& grad_logprobs, const Tensor& grad_entropy, const LabelledRows& labelled,
                                 const Tensor& lse, const Tensor& logprobs, const Tensor& entropy,
                                 const Tensor& columns) {
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
            "cross_entropy: lse, logprobs, entropy and columns must be those of the forward pass");
    return tensor.data_or_null<const float>();
  };
  const CrossEntropyBackward p{labelled.rows,
                               gradient(grad_loss),
                               gradient(grad_lse),
                               gradient(grad_logprobs),
                               gradient(grad_entropy),
                               saved(lse, true),
                               saved(logprobs, true),
                               saved(entropy, grad_entropy.numel() != 0),
                               saved(columns, labelled.rows.label_smoothing != 0.0),
                               grad_logits.data(),
                               grad_logits.stride(0)};
  if (n_rows > 0) cross_entropy_backward(p, torch_threads());
}

std::tuple<Tensor> cross_entropy_backward_cpu(const Tensor& grad_loss, const Tensor& grad_lse,
                                              const Tensor& grad_logprobs, const Tensor& grad_entropy,
                                              const Tensor& logits, const Tensor& target, const Tensor& lse,
                                              const Tensor& logprobs, const Tensor& entropy, const Tensor& columns,
                                              int64_t ignore_index, double label_smoothing, double z_loss,
                                              double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  Tensor grad_logits = Tensor::empty({logits.size(0), logits.size(1)}, logits.dtype());
  advise_huge_pages(grad_logits, bytes_of(labelled.rows.element));
  cross_entropy_backward_into(grad_logits, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse, logprobs,
                              entropy, columns);
  return {std::move(grad_logits)};
}

void cross_entropy_backward_inplace_cpu(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                                        const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                                        const Tensor& lse, const Tensor& logprobs, const Tensor& entropy,
                                        const Tensor& columns, int64_t ignore_index, double label_smoothing,
                                        double z_loss, double softcap, double logit_scale) {
  const LabelledRows labelled(logits, target, ignore_index, label_smoothing, z_loss, softcap, logit_scale);
  require(logits.size(0) <= 1 || logits.stride(0) >= logits.size(1),
          "cross_entropy: rows of logits that overlap in memory cannot hold their gradients");
  cross_entropy_backward_into(logits, grad_loss, grad_lse, grad_logprobs, grad_entropy, labelled, lse, logprobs,
                              entropy, columns);
}

const bool registered = [] {
  static CpuLibrary library("maskops");
  library.implement<&cross_entropy_forward_cpu>("cross_entropy_forward");
  library.implement<&cross_entropy_backward_cpu>("cross_entropy_backward");
  library.implement<&cross_entropy_backward_inplace_cpu>("cross_entropy_backward_");
  return true;
}();

}  // namespace
}  // namespace maskops
