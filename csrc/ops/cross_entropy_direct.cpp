// Bindings of cross-entropy of a few plain rows: labels, no extra result, and the reduction in the operator, since each
// operation of torch behind it takes longer than all rows together.
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/cross_entropy.h"
#include "cross_entropy.h"

namespace maskops {
namespace {

// Holds what CrossEntropyRows points to; the message of a wrong label is for nobody: the full way has a better one.
struct PlainRows {
  std::vector<int32_t> labels;
  CrossEntropyRows rows{};
  int64_t kept = 0;

  PlainRows(const Tensor& logits, const Tensor& target, int64_t ignore_index) {
    require(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) < INT32_MAX &&
                (logits.size(1) == 1 || logits.stride(1) == 1),
            "cross_entropy: logits must have 2 dimensions and contiguous columns");
    require(target.dim() == 1 && target.size(0) == logits.size(0), "cross_entropy: target must have a label per row");
    rows.logits = logits.data();
    rows.element = element_of(logits);
    rows.n_rows = logits.size(0);
    rows.vocabulary = logits.size(1);
    rows.row_stride = logits.stride(0);
    rows.logit_scale = 1.0;
    labels.resize(static_cast<size_t>(rows.n_rows));
    const bool wide = target.dtype() == DType::int64;
    require(wide || target.dtype() == DType::int32, "cross_entropy: target must be int32 or int64");
    const void* values = target.data_or_null();
    for (int64_t row = 0; row < rows.n_rows; row++) {
      const int64_t at = row * target.stride(0);
      const int64_t label = wide ? static_cast<const int64_t*>(values)[at] : static_cast<const int32_t*>(values)[at];
      const bool ignored = label == ignore_index;
      require(ignored || (0 <= label && label < rows.vocabulary), "cross_entropy: a label is outside the vocabulary");
      labels[static_cast<size_t>(row)] = ignored ? -1 : static_cast<int32_t>(label);
      kept += !ignored;
    }
    rows.labels = labels.data();
  }
  // What the loss of a row that is kept is multiplied by.
  float factor(bool mean) const { return !mean ? 1.0f : kept == 0 ? 0.0f : 1.0f / static_cast<float>(kept); }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_direct_cpu(const Tensor& logits, const Tensor& target,
                                                            int64_t ignore_index, bool mean) {
  const PlainRows plain(logits, target, ignore_index);
  const int64_t n_rows = plain.rows.n_rows;
  Tensor loss = Tensor::empty_strided(0, nullptr, nullptr, DType::float32);
  Tensor lse = Tensor::empty({n_rows}, DType::float32), logprobs = Tensor::empty({n_rows}, DType::float32);
  std::vector<float> losses(static_cast<size_t>(n_rows));
  if (n_rows > 0) {
    cross_entropy_forward(
        {plain.rows, losses.data(), lse.data<float>(), logprobs.data<float>(), nullptr, nullptr, nullptr},
        torch_threads());
  }
  // Products in float32 and their sum in double precision, as reduce_rows in rows.py has it: the same bits.
  const float factor = plain.factor(mean);
  double sum = 0.0;
  for (const float row : losses) sum += static_cast<double>(row * factor);
  *loss.data<float>() = static_cast<float>(sum);
  return {std::move(loss), std::move(lse), std::move(logprobs)};
}

// For calls without a graph: results that nobody reads cost Python as much as the rows.
std::tuple<Tensor> cross_entropy_loss_cpu(const Tensor& logits, const Tensor& target, int64_t ignore_index, bool mean) {
  return std::move(std::get<0>(cross_entropy_direct_cpu(logits, target, ignore_index, mean)));
}

std::tuple<Tensor> cross_entropy_direct_backward_cpu(const Tensor& grad_loss, const Tensor& logits,
                                                     const Tensor& target, const Tensor& lse, const Tensor& logprobs,
                                                     int64_t ignore_index, bool mean) {
  const PlainRows plain(logits, target, ignore_index);
  const CrossEntropyRows& rows = plain.rows;
  require(grad_loss.numel() == 1 && grad_loss.dtype() == DType::float32,
          "cross_entropy: the gradient of the loss must be one float32");
  for (const Tensor* saved : {&lse, &logprobs}) {
    require(saved->dim() == 1 && saved->dtype() == DType::float32 && saved->size(0) == rows.n_rows &&
                (rows.n_rows <= 1 || saved->stride(0) == 1),
            "cross_entropy: lse and logprobs must be those of the forward pass");
  }
  Tensor grad_logits = Tensor::empty({rows.n_rows, rows.vocabulary}, logits.dtype());
  if (rows.n_rows > 0) {
    const float factor = *grad_loss.data<float>() * plain.factor(mean);
    CrossEntropyBackward p{};
    p.rows = rows;
    p.grad_loss = {&factor, 0};
    p.lse = lse.data<float>();
    p.logprobs = logprobs.data<float>();
    p.grad_logits = grad_logits.data();
    p.grad_row_stride = rows.vocabulary;
    cross_entropy_backward(p, torch_threads());
  }
  return {std::move(grad_logits)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&cross_entropy_direct_cpu>("cross_entropy_direct");
  library.implement<&cross_entropy_loss_cpu>("cross_entropy_loss");
  library.implement<&cross_entropy_direct_backward_cpu>("cross_entropy_direct_backward");
  return true;
}();

}  // namespace
}  // namespace maskops
