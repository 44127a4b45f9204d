// Bindings of the masked softmax.
#include "softmax.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../cpu/softmax.h"

namespace maskops {
namespace {

// Spans of a plan, and what they point to.
struct PlannedSpans {
  std::vector<int64_t> valid_before;
  SoftmaxSpans spans;

  PlannedSpans(const Tensor& x, int64_t dim, const Tensor& start, const Tensor& end, const Tensor& key_valid)
      : spans(softmax_spans(x, dim, start, end, key_valid)) {
    if (spans.start == nullptr) return;
    const int64_t k_len = key_valid.size(1);
    valid_before.resize(static_cast<size_t>(spans.plan_batch * (k_len + 1)));
    int64_t* before = valid_before.data();
    for (int64_t b = 0; b < spans.plan_batch; b++, before += k_len + 1) {
      const uint8_t* valid = spans.key_valid + b * spans.key_batch_stride;
      before[0] = 0;
      for (int64_t key = 0; key < k_len; key++) before[key + 1] = before[key] + (valid[key] != 0);
    }
    spans.valid_before = valid_before.data();
  }
};

std::tuple<Tensor, Tensor> masked_softmax_forward_cpu(const Tensor& x, const Tensor& mask, const Tensor& start,
                                                      const Tensor& end, const Tensor& key_valid, int64_t dim,
                                                      bool return_lse) {
  require(is_absent(mask) || mask.dtype() == DType::boolean, "masked_softmax: mask must be bool");
  require(is_absent(mask) || is_absent(start), "masked_softmax: give a mask or spans, not both");
  Tensor weights = empty_dense(x.sizes(), x.dim(), x.dtype(), x.place());
  const Common common({&x, &mask, &weights}, weights, dim);
  Tensor lse = return_lse ? empty_per_softmax(x, dim) : Tensor::empty({0}, DType::float32);
  if (x.numel() == 0) {
    std::fill_n(lse.data<float>(), lse.numel(), -std::numeric_limits<float>::infinity());
    return {std::move(weights), std::move(lse)};
  }
  const PlannedSpans planned(x, dim, start, end, key_valid);
  softmax_forward({common.shape, common.operands[0], common.operands[1], common.operands[2], planned.spans,
                   return_lse ? lse.data<float>() : nullptr},
                  torch_threads());
  return {std::move(weights), std::move(lse)};
}

std::tuple<Tensor> masked_softmax_backward_cpu(const Tensor& grad_weights, const Tensor& grad_lse,
                                               const Tensor& weights, const Tensor& start, const Tensor& end,
                                               const Tensor& key_valid, int64_t dim) {
  require(grad_weights.dtype() == weights.dtype(), "masked_softmax: weights and their gradient must have one dtype");
  Tensor grad_x = empty_dense(weights.sizes(), weights.dim(), weights.dtype(), weights.place());
  const Common common({&weights, &grad_weights, &grad_x}, grad_x, dim);
  if (weights.numel() == 0) return {std::move(grad_x)};
  const float* lse_gradient = softmax_grad_lse(grad_lse, weights, dim);
  require_saved_weights(common.shape, common.operands[0], common.operands[2]);
  const PlannedSpans planned(weights, dim, start, end, key_valid);
  softmax_backward(
      {common.shape, common.operands[0], common.operands[1], common.operands[2], planned.spans, lse_gradient},
      torch_threads());
  return {std::move(grad_x)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&masked_softmax_forward_cpu>("masked_softmax_forward");
  library.implement<&masked_softmax_backward_cpu>("masked_softmax_backward");
  return true;
}();

}  // namespace
}  // namespace maskops
