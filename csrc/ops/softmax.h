// What the bindings of the masked softmax share: tensors to plain parameters, whatever the device.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../softmax.h"
#include "tensors.h"

namespace maskops {

inline Tensor empty_dense(const int64_t* sizes, int64_t dim, DType dtype, Place place) {
  std::vector<int64_t> strides(static_cast<size_t>(dim));
  int64_t running = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[static_cast<size_t>(d)] = running;
    running *= std::max<int64_t>(sizes[d], 1);
  }
  return Tensor::empty_strided(dim, sizes, strides.data(), dtype, place);
}

// A tensor of x's sizes without the dimension of the softmax.
inline Tensor empty_per_softmax(const Tensor& x, int64_t dim) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); d++)
    if (d != dim) sizes.push_back(x.size(d));
  return empty_dense(sizes.data(), static_cast<int64_t>(sizes.size()), DType::float32, x.place());
}

// An absent mask, gradient or plan is an empty tensor of one dimension.
inline bool is_absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

// The common shape of some tensors with the strides of each; `dense` is the one that will be written, which is dense.
// Masks, which are bool, broadcast to it.
struct Common {
  SoftmaxShape shape{};
  std::vector<SoftmaxOperand> operands;

  Common(const std::vector<const Tensor*>& tensors, const Tensor& dense, int64_t dim) {
    const int64_t n_dims = dense.dim();
    require(0 <= dim && dim < n_dims && n_dims <= SOFTMAX_DIMENSIONS, "masked_softmax: dim is not one of x's");
    const int64_t* const full = dense.sizes();
    std::vector<std::array<int64_t, SOFTMAX_DIMENSIONS>> strides(tensors.size());
    for (size_t t = 0; t < tensors.size(); t++) {
      const Tensor& tensor = *tensors[t];
      operands.push_back({});
      strides[t].fill(0);
      if (is_absent(tensor)) continue;
      const bool broadcasts = tensor.dtype() == DType::boolean;
      const int64_t *const sizes = tensor.sizes(), *const own = tensor.strides(), missing = n_dims - tensor.dim();
      bool fits = missing == 0 || (broadcasts && missing > 0);
      for (int64_t d = std::max<int64_t>(missing, 0); d < n_dims && fits; d++) {
        const int64_t size = sizes[d - missing];
        fits = size == full[d] || (broadcasts && size == 1);
        if (size == full[d]) strides[t][static_cast<size_t>(d)] = own[d - missing];
      }
      require(fits, "masked_softmax: the tensors must have the sizes of x, or be a mask that broadcasts to them");
      operands.back().data = tensor.data();
      operands.back().along = strides[t][static_cast<size_t>(dim)];
    }
    shape.element = element_of(dense);
    shape.length = full[dim];
    // Outer dimensions in order, without those of size 1; two that every tensor walks with one stride are one.
    int& count = shape.n_outer;
    int after = 0;  // of them, those behind the softmax
    for (int64_t d = 0; d < n_dims; d++) {
      if (d == dim) after = 0;
      if (d == dim || full[d] == 1) continue;
      const auto stride = [&](size_t t) { return strides[t][static_cast<size_t>(d)]; };
      bool joins = count > 0 && (d < dim || after > 0);
      for (size_t t = 0; t < tensors.size() && joins; t++) joins = operands[t].outer[count - 1] == stride(t) * full[d];
      if (!joins) {
        count++;
        after++;
      }
      shape.outer_sizes[count - 1] = joins ? shape.outer_sizes[count - 1] * full[d] : full[d];
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

// Spans of a plan, but for what the CPU counts of them.
inline SoftmaxSpans softmax_spans(const Tensor& x, int64_t dim, const Tensor& start, const Tensor& end,
                                  const Tensor& key_valid) {
  SoftmaxSpans spans{};
  if (is_absent(start)) return spans;
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
  return spans;
}

// The gradient of the lse, nullptr where there is none.
inline const float* softmax_grad_lse(const Tensor& grad_lse, const Tensor& weights, int64_t dim) {
  if (is_absent(grad_lse)) return nullptr;
  int64_t running = 1;
  bool is_dense = grad_lse.dtype() == DType::float32 && grad_lse.dim() == weights.dim() - 1;
  for (int64_t d = grad_lse.dim(); d-- > 0 && is_dense;) {
    is_dense = grad_lse.size(d) == weights.size(d < dim ? d : d + 1) &&
               (grad_lse.size(d) == 1 || grad_lse.stride(d) == running);
    running *= grad_lse.size(d);
  }
  require(is_dense, "masked_softmax: the gradient of the lse must be float32, dense and one value a softmax");
  return grad_lse.data<float>();
}

// The weights of the forward pass lie as their gradients will.
inline void require_saved_weights(const SoftmaxShape& shape, const SoftmaxOperand& saved,
                                  const SoftmaxOperand& result) {
  require((shape.length == 1 || saved.along == result.along) && saved.across == result.across &&
              std::equal(saved.outer, saved.outer + SOFTMAX_DIMENSIONS, result.outer),
          "masked_softmax: weights must be those of the forward pass, dense");
}

}  // namespace maskops
