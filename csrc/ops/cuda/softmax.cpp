// Bindings of the masked softmax on a CUDA device.
#include "../softmax.h"

#include <tuple>

#include "../../cuda/softmax.h"
#include "tensors.h"

namespace maskops {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& mask, const Tensor& start, const Tensor& end,
                                   const Tensor& key_valid, int64_t dim, bool return_lse) {
  const Call call(x);
  call.require_here({&mask, &start, &end, &key_valid});
  require(is_absent(mask) || mask.dtype() == DType::boolean, "masked_softmax: mask must be bool");
  require(is_absent(mask) || is_absent(start), "masked_softmax: give a mask or spans, not both");
  Tensor weights = empty_dense(x.sizes(), x.dim(), x.dtype(), x.place());
  const Common common({&x, &mask, &weights}, weights, dim);
  Tensor lse = return_lse ? empty_per_softmax(x, dim) : call.empty({0}, DType::float32);
  const SoftmaxForward p = {common.shape, common.operands[0], common.operands[1], common.operands[2],
                            // Where nothing is there, neither are spans; every lse is -inf.
                            x.numel() == 0 ? SoftmaxSpans{} : softmax_spans(x, dim, start, end, key_valid),
                            lse.data_or_null<float>()};
  softmax_forward_cuda(p, call.stream());
  return {std::move(weights), std::move(lse)};
}

std::tuple<Tensor> backward(const Tensor& grad_weights, const Tensor& grad_lse, const Tensor& weights,
                            const Tensor& start, const Tensor& end, const Tensor& key_valid, int64_t dim) {
  const Call call(weights);
  call.require_here({&grad_weights, &grad_lse, &start, &end, &key_valid});
  require(grad_weights.dtype() == weights.dtype(), "masked_softmax: weights and their gradient must have one dtype");
  Tensor grad_x = empty_dense(weights.sizes(), weights.dim(), weights.dtype(), weights.place());
  const Common common({&weights, &grad_weights, &grad_x}, grad_x, dim);
  if (weights.numel() == 0) return {std::move(grad_x)};
  const float* lse_gradient = softmax_grad_lse(grad_lse, weights, dim);
  require_saved_weights(common.shape, common.operands[0], common.operands[2]);
  softmax_backward_cuda({common.shape, common.operands[0], common.operands[1], common.operands[2],
                         softmax_spans(weights, dim, start, end, key_valid), lse_gradient},
                        call.stream());
  return {std::move(grad_x)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&forward>("masked_softmax_forward_cuda");
  library.implement<&backward>("masked_softmax_backward_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
