// Bindings of the masked softmax.
#include "../cpu/softmax.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace maskops {
namespace {

Tensor empty_dense(const int64_t* sizes, int64_t dim, DType dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(dim));
  int64_t running = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[static_cast<size_t>(d)] = running;
    running *= std::max<int64_t>(sizes[d], 1);
  }
  return Tensor::empty_strided(dim, sizes, strides.data(), dtype);
}

// A tensor of x's sizes without the dimension of the softmax.
Tensor empty_per_softmax(const Tensor& x, int64_t dim) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); d++)
    if (d != dim) sizes.push_back(x.size(d));
  return empty_dense(sizes.data(), static_cast<int64_t>(sizes.size()), DType::float32);
}

// An absent mask, gradient or plan is an empty tensor of one dimension.
bool is_absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

// The common shape of some tensors with the strides of each; `dense` is the one that will be written, which is dense.
struct Common {
  SoftmaxShape shape{};
  std::vector<SoftmaxOperand> operands;

  Common(const std::vector<const Tensor*>& tensors, const Tensor& dense, int64_t dim) {
    const int64_t n_dims = dense.dim();
    require(0 <= dim && dim < n_dims && n_dims <= SOFTMAX_DIMENSIONS, "masked_softmax: dim is not one of x's");
    for (const Tensor* tensor : tensors) {
      operands.push_back({});
      if (is_absent(*tensor)) continue;
      require(tensor->dim() == n_dims && std::equal(tensor->sizes(), tensor->sizes() + n_dims, dense.sizes()),
              "masked_softmax: the tensors must have the sizes of x");
      operands.back().data = tensor->data();
      operands.back().along = tensor->stride(dim);
    }
    shape.element = element_of(dense);
    shape.length = dense.size(dim);
    // Outer dimensions in order, without those of size 1; two that every tensor walks with one stride are one.
    int& count = shape.n_outer;
    int after = 0;  // of them, those behind the softmax
    for (int64_t d = 0; d < n_dims; d++) {
      if (d == dim) after = 0;
      if (d == dim || dense.size(d) == 1) continue;
      const auto stride = [&](size_t t) { return is_absent(*tensors[t]) ? 0 : tensors[t]->stride(d); };
      bool joins = count > 0 && (d < dim || after > 0);
      for (size_t t = 0; t < tensors.size() && joins; t++)
        joins = operands[t].outer[count - 1] == stride(t) * dense.size(d);
      if (!joins) {
        count++;
        after++;
      }
      shape.outer_sizes[count - 1] = joins ? shape.outer_sizes[count - 1] * dense.size(d) : dense.size(d);
      for (size_t t = 0; t < tensors.size(); t++) operands[t].outer[count - 1] = stride(t);
    }
    // The last dimension behind the softmax gives the lanes: the results are dense in it.
    shape.lanes = 1;
    if (after > 0) {
      shape.lanes = shape.outer_sizes[--count];
      for (SoftmaxOperand& operand : operands) {
        operand.across = operand.outer[count];
        operand.outer[count] = 0;
      }
    }
    shape.outer_count = 1;
    for (int d = 0; d < count; d++) shape.outer_count *= shape.outer_sizes[d];
  }
};

// Spans of a plan, and what they point to.
struct PlannedSpans {
  std::vector<int64_t> valid_before;
  SoftmaxSpans spans{};

  PlannedSpans(const Tensor& x, int64_t dim, const Tensor& start, const Tensor& end, const Tensor& key_valid) {
    if (is_absent(start)) return;
    const int64_t n_dims = x.dim();
    require(n_dims >= 2 && dim == n_dims - 1, "masked_softmax: spans lie along the last of at least two dimensions");
    require(start.dim() == 3 && end.dim() == 3 && key_valid.dim() == 2,
            "masked_softmax: the spans have the wrong number of dimensions");
    require(start.dtype() == DType::int32 && end.dtype() == DType::int32 && key_valid.dtype() == DType::uint8,
            "masked_softmax: the spans must be int32 and key_valid uint8");
    const int64_t batch = n_dims == 2 ? 1 : x.size(0), q_len = x.size(n_dims - 2), k_len = x.size(n_dims - 1);
    const int64_t n_spans = start.size(0), plan_batch = start.size(1);
    require(n_spans >= 1 && end.size(0) == n_spans && end.size(1) == plan_batch && key_valid.size(0) == plan_batch,
            "masked_softmax: start, end and key_valid must agree in shape");
    require((plan_batch == 1 || plan_batch == batch) && start.size(2) == q_len && end.size(2) == q_len &&
                key_valid.size(1) == k_len,
            "masked_softmax: the spans are for other sizes than those of x");
    require((q_len <= 1 || (start.stride(2) == 1 && end.stride(2) == 1)) && start.stride(0) == end.stride(0) &&
                start.stride(1) == end.stride(1) && (k_len <= 1 || key_valid.stride(1) == 1),
            "masked_softmax: the spans must be contiguous");
    spans.start = start.data<int32_t>();
    spans.end = end.data<int32_t>();
    spans.key_valid = key_valid.data<uint8_t>();
    spans.span_stride = start.stride(0);
    spans.batch_stride = start.stride(1);
    spans.key_batch_stride = key_valid.stride(0);
    spans.n_spans = n_spans;
    spans.plan_batch = plan_batch;
    spans.q_len = q_len;
    spans.rows_per_batch_element = n_dims == 2 ? q_len : x.numel() / k_len / batch;
    valid_before.resize(static_cast<size_t>(plan_batch * (k_len + 1)));
    int64_t* before = valid_before.data();
    for (int64_t b = 0; b < plan_batch; b++, before += k_len + 1) {
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
  Tensor weights = empty_dense(x.sizes(), x.dim(), x.dtype());
  const Common common({&x, &mask, &weights}, weights, dim);
  Tensor lse = return_lse ? empty_per_softmax(x, dim) : Tensor::empty({0}, DType::float32);
  if (x.numel() == 0) {
    std::fill_n(lse.data<float>(), lse.numel(), -std::numeric_limits<float>::infinity());
    return {std::move(weights), std::move(lse)};
  }
  advise_huge_pages(weights, bytes_of(common.shape.element));
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
  Tensor grad_x = empty_dense(weights.sizes(), weights.dim(), weights.dtype());
  const Common common({&weights, &grad_weights, &grad_x}, grad_x, dim);
  if (weights.numel() == 0) return {std::move(grad_x)};
  const bool has_grad_lse = !(grad_lse.dim() == 1 && grad_lse.numel() == 0);
  if (has_grad_lse) {
    int64_t running = 1;
    bool is_dense = grad_lse.dtype() == DType::float32 && grad_lse.dim() == weights.dim() - 1;
    for (int64_t d = grad_lse.dim(); d-- > 0 && is_dense;) {
      is_dense = grad_lse.size(d) == weights.size(d < dim ? d : d + 1) &&
                 (grad_lse.size(d) == 1 || grad_lse.stride(d) == running);
      running *= grad_lse.size(d);
    }
    require(is_dense, "masked_softmax: the gradient of the lse must be float32, dense and one value a softmax");
  }
  const SoftmaxOperand &saved = common.operands[0], &result = common.operands[2];
  require((common.shape.length == 1 || saved.along == result.along) && saved.across == result.across &&
              std::equal(saved.outer, saved.outer + SOFTMAX_DIMENSIONS, result.outer),
          "masked_softmax: weights must be those of the forward pass, dense");
  advise_huge_pages(grad_x, bytes_of(common.shape.element));
  const PlannedSpans planned(weights, dim, start, end, key_valid);
  softmax_backward({common.shape, common.operands[0], common.operands[1], common.operands[2], planned.spans,
                    has_grad_lse ? grad_lse.data<float>() : nullptr},
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
