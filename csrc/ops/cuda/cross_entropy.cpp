// Bindings of cross-entropy on a CUDA device. Labels stay there: the kernels follow none that is outside of the
// vocabulary (maskops.validate() checks them).
#include "../cross_entropy.h"

#include <tuple>

#include "../../cuda/cross_entropy.h"
#include "tensors.h"

namespace maskops {
namespace {

CudaLabels labels_of(const Tensor& target, int64_t ignore_index) {
  return {target.data(), target.stride(0), ignore_index, target.dtype() == DType::int64};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// New tensors for the results of the forward pass: loss, lse, logprobs, entropy, argmax, statistics.
Outputs outputs_of(const Call& call, const CrossEntropyRows& rows, bool entropy, bool argmax) {
  const auto per_row = [&](bool wanted, DType dtype) { return call.empty({wanted ? rows.n_rows : 0}, dtype); };
  return {per_row(true, DType::float32),
          per_row(true, DType::float32),
          per_row(true, DType::float32),
          per_row(entropy, DType::float32),
          per_row(argmax, DType::int64),
          call.empty({has_statistics(rows) ? rows.n_rows : 0, N_ROW_STATISTICS}, DType::float64)};
}

CrossEntropyForward forward_of(const CrossEntropyRows& rows, const Outputs& outputs) {
  const auto& [loss, lse, logprobs, entropy, argmax, statistics] = outputs;
  return {rows,
          loss.data<float>(),
          lse.data<float>(),
          logprobs.data<float>(),
          entropy.data_or_null<float>(),
          argmax.data_or_null<int64_t>(),
          statistics.data_or_null<double>()};
}

Outputs forward(const Tensor& logits, const Tensor& target, const Tensor& class_weights, const Tensor& probabilities,
                bool shift, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                double logit_scale, bool entropy, bool argmax) {
  const Call call(logits);
  call.require_here({&target, &class_weights, &probabilities});
  const CrossEntropyRows rows = cross_entropy_rows(logits, target, class_weights, probabilities, shift, label_smoothing,
                                                   z_loss, softcap, logit_scale);
  Outputs outputs = outputs_of(call, rows, entropy, argmax);
  if (rows.n_rows > 0)
    cross_entropy_forward_cuda(forward_of(rows, outputs), labels_of(target, ignore_index), call.device(),
                               call.stream());
  return outputs;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                                    const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                                    const Tensor& class_weights, const Tensor& probabilities, const Tensor& lse,
                                    const Tensor& logprobs, const Tensor& entropy, const Tensor& statistics, bool shift,
                                    bool probabilities_grad, int64_t ignore_index, double label_smoothing,
                                    double z_loss, double softcap, double logit_scale) {
  const Call call(logits);
  call.require_here({&grad_loss, &grad_lse, &grad_logprobs, &grad_entropy, &target, &class_weights, &probabilities,
                     &lse, &logprobs, &entropy, &statistics});
  const CrossEntropyRows rows = cross_entropy_rows(logits, target, class_weights, probabilities, shift, label_smoothing,
                                                   z_loss, softcap, logit_scale);
  Tensor grad_logits = call.empty({rows.n_rows, rows.vocabulary}, logits.dtype());
  const bool wanted = probabilities_grad && is_soft(rows);
  Tensor grad_probabilities = call.empty({wanted ? rows.n_rows : 0, rows.vocabulary}, probabilities.dtype());
  char* first = nullptr;
  if (wanted) {
    first = static_cast<char*>(grad_probabilities.data());
    if (shift) first += rows.vocabulary * bytes_of(rows.probability_element);
  }
  const CrossEntropyBackward p = cross_entropy_backward_of(rows, grad_loss, grad_lse, grad_logprobs, grad_entropy, lse,
                                                           logprobs, entropy, statistics, grad_logits, first);
  if (rows.n_rows > 0) cross_entropy_backward_cuda(p, labels_of(target, ignore_index), call.stream());
  return {std::move(grad_logits), std::move(grad_probabilities)};
}

void backward_in_place(const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs,
                       const Tensor& grad_entropy, const Tensor& logits, const Tensor& target,
                       const Tensor& class_weights, const Tensor& probabilities, const Tensor& lse,
                       const Tensor& logprobs, const Tensor& entropy, const Tensor& statistics, bool shift,
                       int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                       double logit_scale) {
  const Call call(logits);
  call.require_here({&grad_loss, &grad_lse, &grad_logprobs, &grad_entropy, &target, &class_weights, &probabilities,
                     &lse, &logprobs, &entropy, &statistics});
  const CrossEntropyRows rows = cross_entropy_rows(logits, target, class_weights, probabilities, shift, label_smoothing,
                                                   z_loss, softcap, logit_scale);
  require_distinct_rows(logits);
  const CrossEntropyBackward p = cross_entropy_backward_of(rows, grad_loss, grad_lse, grad_logprobs, grad_entropy, lse,
                                                           logprobs, entropy, statistics, logits, nullptr);
  if (rows.n_rows > 0) cross_entropy_backward_cuda(p, labels_of(target, ignore_index), call.stream());
}

// Both passes of rows that are scored against their labels: their gradients replace the logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both_in_place(
    const Tensor& grad_loss, const Tensor& grad_lse, const Tensor& grad_logprobs, const Tensor& grad_entropy,
    const Tensor& logits, const Tensor& target, const Tensor& class_weights, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, double logit_scale, bool entropy, bool argmax) {
  const Call call(logits);
  call.require_here({&grad_loss, &grad_lse, &grad_logprobs, &grad_entropy, &target, &class_weights});
  const Tensor no_probabilities = call.empty({0}, DType::float32);
  const CrossEntropyRows rows = cross_entropy_rows(logits, target, class_weights, no_probabilities, false,
                                                   label_smoothing, z_loss, softcap, logit_scale);
  require_distinct_rows(logits);
  Outputs outputs = outputs_of(call, rows, entropy, argmax);
  auto& [loss, lse, logprobs, uncertainty, highest, statistics] = outputs;
  const CrossEntropyBackward backward = cross_entropy_backward_of(
      rows, grad_loss, grad_lse, grad_logprobs, grad_entropy, lse, logprobs, uncertainty, statistics, logits, nullptr);
  if (rows.n_rows > 0) {
    cross_entropy_both_cuda(forward_of(rows, outputs), backward, labels_of(target, ignore_index), call.device(),
                            call.stream());
  }
  return {std::move(loss), std::move(lse), std::move(logprobs), std::move(uncertainty), std::move(highest)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&forward>("cross_entropy_forward_cuda");
  library.implement<&backward>("cross_entropy_backward_cuda");
  library.implement<&backward_in_place>("cross_entropy_backward__cuda");
  library.implement<&both_in_place>("cross_entropy_both__cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
