// What the bindings of attention share, whatever the device: checks of shapes, strides and dtypes, and the parameters
// that follow from them. What depends on values is the devices' own.
#pragma once

#include <cmath>

#include "../attention.h"
#include "../plan.h"
#include "tensors.h"

namespace maskops {

inline bool adjacent(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

// A stride of 0 where a dimension of 1 serves every index.
inline int64_t broadcast_stride(const Tensor& tensor, int64_t d) { return tensor.size(d) == 1 ? 0 : tensor.stride(d); }

// Tensors, or what is seen as tensors of four dimensions.
template <class Rows>
AttentionShape attention_shape(const Rows& q, const Rows& k, const Rows& v, double softmax_scale, double softcap) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must have 4 dimensions");
  require(q.dtype() == k.dtype() && q.dtype() == v.dtype(), "attention: q, k and v must have one dtype");
  const AttentionShape shape{element_of(q),
                             q.size(0),
                             q.size(1),
                             k.size(1),
                             q.size(2),
                             k.size(2),
                             q.size(3),
                             v.size(3),
                             static_cast<float>(softmax_scale),
                             static_cast<float>(softcap)};
  require(k.size(0) == shape.batch && v.size(0) == shape.batch, "attention: q, k and v must have one batch size");
  require(k.size(3) == shape.head_dim, "attention: q and k must have one head dimension");
  require(v.size(1) == shape.kv_heads && v.size(2) == shape.k_len, "attention: k and v must have the same rows");
  require(shape.heads == 0 || (shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0),
          "attention: the heads of k and v must divide those of q");
  // The kernels count rows and keys up to the end of a tile.
  require(shape.q_len < INT32_MAX - tile_rows && shape.k_len < INT32_MAX - tile_rows,
          "attention: at most 2^31 - 130 queries and keys");
  require(shape.heads <= INT32_MAX / tile_rows && shape.batch < INT32_MAX, "attention: too many heads");
  require(shape.head_dim < INT32_MAX / 2 && shape.value_dim < INT32_MAX / 2, "attention: head_dim is too large");
  for (const Rows* tensor : {&q, &k, &v}) {
    require(last_is_contiguous(*tensor), "attention: the last dimension must be contiguous");
  }
  return shape;
}

inline bool has_work(const AttentionShape& shape) { return shape.batch > 0 && shape.heads > 0 && shape.q_len > 0; }

struct SpanTensors {
  const Tensor &start, &end, &key_valid, &tiles, &tile_count;
};

// Of the spans, all but how many items the work list has: that number is a value. Limits of keys are clamped by the
// kernels themselves.
template <class AnySpans>
AnySpans planned_spans(const AttentionShape& shape, const SpanTensors& plan) {
  const auto& [start, end, key_valid, tiles, tile_count] = plan;
  require(start.dim() == 3 && end.dim() == 3 && key_valid.dim() == 2 && tiles.dim() == 2 && tile_count.numel() == 1,
          "attention: the spans have the wrong number of dimensions");
  require(start.dtype() == DType::int32 && end.dtype() == DType::int32 && tiles.dtype() == DType::int32 &&
              tile_count.dtype() == DType::int32 && key_valid.dtype() == DType::uint8,
          "attention: the spans must be int32 and key_valid uint8");
  const int64_t n_spans = start.size(0), plan_batch = start.size(1);
  require(n_spans >= 1 && end.size(0) == n_spans && end.size(1) == plan_batch && key_valid.size(0) == plan_batch,
          "attention: start, end and key_valid must agree in shape");
  require(plan_batch == 1 || plan_batch == shape.batch, "attention: the spans are for another batch size");
  require(start.size(2) == shape.q_len && end.size(2) == shape.q_len && key_valid.size(1) == shape.k_len,
          "attention: the spans are for other lengths than those of q and k");
  require(tiles.size(1) == 4 + 4 * n_spans && tiles.size(0) < INT32_MAX, "attention: tiles has the wrong width");
  require(adjacent(start) && adjacent(end) && adjacent(key_valid) && adjacent(tiles) &&
              (tiles.size(0) <= 1 || tiles.stride(0) == tiles.size(1)) && start.stride(0) == end.stride(0) &&
              start.stride(1) == end.stride(1),
          "attention: the spans must be contiguous");
  AnySpans spans{};
  spans.start = start.data<int32_t>();
  spans.end = end.data<int32_t>();
  spans.key_valid = key_valid.data<uint8_t>();
  spans.tiles = tiles.data<int32_t>();
  spans.span_stride = start.stride(0);
  spans.batch_stride = plan_batch == 1 ? 0 : start.stride(1);
  spans.key_valid_batch_stride = plan_batch == 1 ? 0 : key_valid.stride(0);
  spans.n_spans = static_cast<int32_t>(n_spans);
  spans.tile_width = static_cast<int32_t>(tiles.size(1));
  spans.plan_batch = static_cast<int32_t>(plan_batch);
  return spans;
}

// Strides of a tensor that broadcasts to these four sizes; an empty tensor is absent.
inline Broadcast broadcast_of(const Tensor& tensor, const int64_t (&full)[4], const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 4, message);
  for (int d = 0; d < 4; d++) require(tensor.size(d) == 1 || tensor.size(d) == full[d], message);
  return {tensor.data(), broadcast_stride(tensor, 0), broadcast_stride(tensor, 1), broadcast_stride(tensor, 2),
          broadcast_stride(tensor, 3)};
}

inline PerHead per_head_of(const AttentionShape& shape, const Tensor& tensor, const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 2 && tensor.dtype() == DType::float32 && tensor.size(1) == shape.heads, message);
  return {tensor.data<float>(), tensor.stride(0), tensor.stride(1), tensor.size(0), false};
}

struct FeatureTensors {
  const Tensor &positions, &dense, &bias, &alibi_slopes, &sinks, &seed;
};

// Of the features, all but the dense mask and dropout.
template <class AnyFeatures>
AnyFeatures score_features(const AttentionShape& shape, int64_t plan_batch, const FeatureTensors& tensors,
                           bool slopes_by_sequence) {
  AnyFeatures features{};
  const int64_t full[4] = {shape.batch, shape.heads, shape.q_len, shape.k_len};
  features.bias = broadcast_of(tensors.bias, full, "attention: bias must broadcast to (batch, heads, q_len, k_len)");
  if (features.bias.data != nullptr) features.bias_element = element_of(tensors.bias);
  features.alibi_slopes =
      per_head_of(shape, tensors.alibi_slopes, "attention: alibi_slopes must be float32 (n, heads)");
  features.sinks = per_head_of(shape, tensors.sinks, "attention: sinks must be float32 (1, heads)");
  require(features.sinks.data == nullptr || features.sinks.outer == 1, "attention: sinks must be float32 (1, heads)");
  const Tensor& positions = tensors.positions;
  if (positions.numel() != 0) {
    require(positions.dim() == 3 && positions.dtype() == DType::int32 && positions.size(0) == 3 &&
                positions.size(1) == plan_batch && positions.size(2) == shape.q_len &&
                (shape.q_len == 1 || positions.stride(2) == 1),
            "attention: positions must be int32 (3, batch of the spans, q_len)");
    features.positions = positions.data<int32_t>();
    features.positions_stride = positions.stride(0);
    features.positions_batch_stride = plan_batch == 1 ? 0 : positions.stride(1);
  }
  if (features.alibi_slopes.data != nullptr && shape.batch > 0 && shape.q_len > 0) {
    require(features.positions != nullptr, "attention: alibi_slopes need positions");
    const int64_t outer = features.alibi_slopes.outer;
    require(slopes_by_sequence ? outer < INT32_MAX : outer == 1 || outer == shape.batch,
            "attention: alibi_slopes must be (1 or batch, heads)");
    features.alibi_slopes.by_sequence = slopes_by_sequence;
  }
  return features;
}

// What a probability means to the kernels. Nothing is dropped where there is no row.
struct DropoutNumbers {
  bool is_on;
  uint32_t last_dropped;
  float kept_scale;
};

inline DropoutNumbers dropout_numbers(const AttentionShape& shape, const Tensor& seed, const int32_t* positions,
                                      double dropout_p) {
  require(0.0 <= dropout_p && dropout_p < 1.0, "attention: dropout_p must be in [0, 1)");
  if (dropout_p == 0.0 || shape.batch == 0 || shape.q_len == 0) return {false, 0, 1.0f};
  require(positions != nullptr, "attention: dropout needs positions");
  require(seed.numel() == 1 && seed.dtype() == DType::int64, "attention: seed must be one int64");
  return {true, static_cast<uint32_t>(std::ceil(dropout_p * 0x1p32) - 1.0),
          static_cast<float>(1.0 / (1.0 - dropout_p))};
}

template <class Rows>
void check_out(const AttentionShape& shape, DType dtype, const Rows& out, const Rows& grad_out) {
  for (const Rows* tensor : {&grad_out, &out}) {
    require(tensor->dim() == 4 && tensor->dtype() == dtype && tensor->size(0) == shape.batch &&
                tensor->size(1) == shape.heads && tensor->size(2) == shape.q_len && tensor->size(3) == shape.value_dim,
            "attention: out and its gradient must have the shape and dtype of the output");
    require(last_is_contiguous(*tensor), "attention: the last dimension of out and its gradient must be contiguous");
  }
}

// What the forward pass gave, and what comes in for it; for the lse that may be nothing.
inline void check_outputs(const AttentionShape& shape, DType dtype, const Tensor& out, const Tensor& grad_out,
                          const Tensor& lse, const Tensor* grad_lse) {
  check_out(shape, dtype, out, grad_out);
  const auto is_dense = [&](const Tensor& tensor) {
    return tensor.dtype() == DType::float32 && tensor.dim() == 3 && tensor.size(0) == shape.batch &&
           tensor.size(1) == shape.heads && tensor.size(2) == shape.q_len &&
           (!has_work(shape) ||
            ((shape.q_len == 1 || tensor.stride(2) == 1) && (shape.heads == 1 || tensor.stride(1) == shape.q_len) &&
             (shape.batch == 1 || tensor.stride(0) == shape.heads * shape.q_len)));
  };
  require(is_dense(lse) && (grad_lse == nullptr || grad_lse->numel() == 0 || is_dense(*grad_lse)),
          "attention: lse and its gradient must be contiguous float32 (batch, heads, q_len)");
}

// New tensors for the gradients. Those of q, k and v lie as these do; the others are contiguous, and empty where they
// are not wanted.
struct Gradients {
  Tensor q, k, v, bias, slopes, sinks;

  Gradients(const AttentionShape& shape, const Tensor& q, const Tensor& k, const Tensor& v,
            const FeatureTensors& tensors, bool wants_bias, bool wants_slopes, bool wants_sinks)
      : q(empty_in_order_of(q, shape.head_dim)),
        k(empty_in_order_of(k, shape.head_dim)),
        v(empty_in_order_of(v, shape.value_dim)),
        bias(contiguous(tensors.bias, wants_bias, q.place())),
        slopes(contiguous(tensors.alibi_slopes, wants_slopes, q.place())),
        sinks(contiguous(tensors.sinks, wants_sinks, q.place())) {}

 private:
  static Tensor contiguous(const Tensor& argument, bool is_wanted, Place place) {
    if (!is_wanted) return Tensor::empty({0}, DType::float32, place);
    const int64_t dim = argument.dim();
    require(dim <= 4, "attention: a gradient has at most 4 dimensions");
    int64_t strides[4], running = 1;
    for (int64_t d = dim; d-- > 0;) {
      strides[d] = running;
      running *= std::max<int64_t>(argument.size(d), 1);
    }
    return Tensor::empty_strided(dim, argument.sizes(), strides, argument.dtype(), place);
  }
};

}  // namespace maskops
