// Bindings of span attention.
#include "../attention.h"

#include <cmath>
#include <string>
#include <tuple>

#include "../cpu/attention.h"
#include "../plan.h"
#include "tensors.h"

namespace maskops {
namespace {

AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale,
                               double softcap) {
  require(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must have 4 dimensions");
  require(q.dtype() == k.dtype() && q.dtype() == v.dtype(), "attention: q, k and v must have one dtype");
  AttentionShape shape{element_of(q),
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
  require(shape.q_len < INT32_MAX && shape.k_len < INT32_MAX, "attention: at most 2^31 - 2 queries and keys");
  require(shape.heads <= INT32_MAX / tile_rows && shape.batch < INT32_MAX, "attention: too many heads");
  for (const Tensor* tensor : {&q, &k, &v}) {
    require(last_is_contiguous(*tensor), "attention: the last dimension must be contiguous");
  }
  return shape;
}

// Checks what the kernels rely on for their memory accesses; the limits of keys are clamped by the kernels themselves.
Spans spans_of(const AttentionShape& shape, const Tensor& start, const Tensor& end, const Tensor& key_valid,
               const Tensor& tiles, const Tensor& tile_count) {
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
  require(tiles.size(1) == 4 + 4 * n_spans, "attention: tiles has the wrong width");
  const auto contiguous = [](const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.size(last) <= 1 || tensor.stride(last) == 1;
  };
  require(contiguous(start) && contiguous(end) && contiguous(key_valid) && contiguous(tiles) &&
              (tiles.size(0) <= 1 || tiles.stride(0) == tiles.size(1)) && start.stride(0) == end.stride(0) &&
              start.stride(1) == end.stride(1),
          "attention: the spans must be contiguous");
  Spans spans{start.data<int32_t>(),
              end.data<int32_t>(),
              key_valid.data<uint8_t>(),
              tiles.data<int32_t>(),
              start.stride(0),
              plan_batch == 1 ? 0 : start.stride(1),
              plan_batch == 1 ? 0 : key_valid.stride(0),
              static_cast<int32_t>(n_spans),
              *tile_count.data<int32_t>(),
              static_cast<int32_t>(tiles.size(1)),
              static_cast<int32_t>(plan_batch)};
  require(0 <= spans.n_tiles && spans.n_tiles <= tiles.size(0), "attention: tile_count exceeds the work list");
  int32_t batch = 0, row = 0;  // the list must cover every row once, in order: each row's output is written by its tile
  for (int64_t tile = 0; tile < spans.n_tiles; tile++) {
    const int32_t* item = spans.tiles + tile * spans.tile_width;
    while (batch < item[0] && row == shape.q_len) {
      batch++;
      row = 0;
    }
    require(item[0] == batch && item[1] == row && 1 <= item[2] && item[2] <= tile_rows && item[2] <= shape.q_len - row,
            "attention: the work list does not cover the rows of q in order");
    row += item[2];
  }
  require(plan_batch == 0 || shape.q_len == 0 || (batch == plan_batch - 1 && row == shape.q_len),
          "attention: the work list does not cover the rows of q");
  return spans;
}

// A tensor that broadcasts to (batch, heads, q_len, k_len); an empty one is absent.
Broadcast broadcast_of(const AttentionShape& shape, const Tensor& tensor, const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 4, message);
  const int64_t full[4] = {shape.batch, shape.heads, shape.q_len, shape.k_len};
  int64_t strides[4];
  for (int d = 0; d < 4; d++) {
    require(tensor.size(d) == 1 || tensor.size(d) == full[d], message);
    strides[d] = tensor.size(d) == 1 ? 0 : tensor.stride(d);
  }
  return {tensor.data(), strides[0], strides[1], strides[2], strides[3]};
}

PerHead per_head_of(const AttentionShape& shape, const Tensor& tensor, const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 2 && tensor.dtype() == DType::float32 && tensor.size(1) == shape.heads, message);
  return {tensor.data<float>(), tensor.stride(0), tensor.stride(1), tensor.size(0), false};
}

struct FeatureTensors {
  const Tensor &positions, &dense, &bias, &alibi_slopes, &sinks, &seed;
};

Features features_of(const AttentionShape& shape, const Spans& spans, const FeatureTensors& tensors,
                     bool slopes_by_sequence, double dropout_p) {
  Features features{};
  if (tensors.bias.numel() != 0) {
    features.bias_element = element_of(tensors.bias);
    features.bias = broadcast_of(shape, tensors.bias, "attention: bias must broadcast to (batch, heads, q_len, k_len)");
  }
  require(tensors.dense.numel() == 0 || tensors.dense.dtype() == DType::boolean, "attention: dense must be bool");
  features.dense =
      broadcast_of(shape, tensors.dense, "attention: dense must broadcast to (batch, heads, q_len, k_len)");
  features.alibi_slopes =
      per_head_of(shape, tensors.alibi_slopes, "attention: alibi_slopes must be float32 (n, heads)");
  features.sinks = per_head_of(shape, tensors.sinks, "attention: sinks must be float32 (1, heads)");
  require(features.sinks.data == nullptr || features.sinks.outer == 1, "attention: sinks must be float32 (1, heads)");

  const Tensor& positions = tensors.positions;
  if (positions.numel() != 0) {
    require(positions.dim() == 3 && positions.dtype() == DType::int32 && positions.size(0) == 3 &&
                positions.size(1) == spans.plan_batch && positions.size(2) == shape.q_len &&
                (shape.q_len == 1 || positions.stride(2) == 1),
            "attention: positions must be int32 (3, batch of the spans, q_len)");
    features.positions = positions.data<int32_t>();
    features.positions_stride = positions.stride(0);
    features.positions_batch_stride = spans.plan_batch == 1 ? 0 : positions.stride(1);
  }
  int32_t last = -1;  // of the ordinals of sequences
  const int64_t placed = features.positions == nullptr ? 0 : spans.plan_batch;
  for (int64_t batch = 0; batch < placed; batch++) {
    const int32_t* ordinals =
        features.positions + 2 * features.positions_stride + batch * features.positions_batch_stride;
    for (int64_t row = 0; row < shape.q_len; row++) last = std::max(last, ordinals[row]);
  }

  PerHead& slopes = features.alibi_slopes;
  const bool has_rows = shape.batch > 0 && shape.q_len > 0;
  if (slopes.data != nullptr && has_rows) {
    require(features.positions != nullptr, "attention: alibi_slopes need positions");
    slopes.by_sequence = slopes_by_sequence;
    if (slopes_by_sequence && last >= slopes.outer) {
      throw std::invalid_argument("alibi_slopes has " + std::to_string(slopes.outer) + " rows, the plan has " +
                                  std::to_string(static_cast<int64_t>(last) + 1) +
                                  " sequences: expected slopes (heads,) or (sequences, heads)");
    }
    require(slopes_by_sequence || slopes.outer == 1 || slopes.outer == shape.batch,
            "attention: alibi_slopes must be (1 or batch, heads)");
  }
  require(0.0 <= dropout_p && dropout_p < 1.0, "attention: dropout_p must be in [0, 1)");
  if (dropout_p > 0.0 && has_rows) {
    require(features.positions != nullptr, "attention: dropout needs positions");
    require(tensors.seed.numel() == 1 && tensors.seed.dtype() == DType::int64, "attention: seed must be one int64");
    const bool shared = spans.plan_batch == 1 && shape.batch > 1;
    features.dropout = {
        true, static_cast<uint32_t>(std::ceil(dropout_p * 0x1p32) - 1.0), static_cast<float>(1.0 / (1.0 - dropout_p)),
        static_cast<uint64_t>(*tensors.seed.data<int64_t>()), shared ? static_cast<uint32_t>(last) + 1 : 0};
  }
  return features;
}

std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                                 const Tensor& end, const Tensor& key_valid, const Tensor& tiles,
                                                 const Tensor& tile_count, const Tensor&, const Tensor&,
                                                 const Tensor& positions, const Tensor& dense, const Tensor& bias,
                                                 const Tensor& alibi_slopes, const Tensor& sinks, const Tensor& seed,
                                                 bool slopes_by_sequence, double softmax_scale, double softcap,
                                                 double dropout_p) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, start, end, key_valid, tiles, tile_count);
  const Features features =
      features_of(shape, spans, {positions, dense, bias, alibi_slopes, sinks, seed}, slopes_by_sequence, dropout_p);
  Tensor out = empty_in_order_of(q, shape.value_dim);
  Tensor lse = Tensor::empty({shape.batch, shape.heads, shape.q_len}, DType::float32);
  if (shape.batch > 0 && shape.heads > 0 && shape.q_len > 0) {
    attention_forward({shape, spans, features, rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data<float>()},
                      torch_threads());
  }
  return {std::move(out), std::move(lse)};
}

// A new contiguous tensor for the gradient of an argument, or an empty one where it is not wanted.
Tensor gradient_of(const Tensor& argument, bool is_wanted) {
  if (!is_wanted) return Tensor::empty({0}, DType::float32);
  const int64_t dim = argument.dim();
  require(dim <= 4, "attention: a gradient has at most 4 dimensions");
  int64_t strides[4], running = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = running;
    running *= std::max<int64_t>(argument.size(d), 1);
  }
  return Tensor::empty_strided(dim, argument.sizes(), strides, argument.dtype());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& start, const Tensor& end, const Tensor& key_valid,
    const Tensor& tiles, const Tensor& tile_count, const Tensor&, const Tensor&, const Tensor& positions,
    const Tensor& dense, const Tensor& bias, const Tensor& alibi_slopes, const Tensor& sinks, const Tensor& seed,
    bool slopes_by_sequence, double softmax_scale, double softcap, double dropout_p, bool wants_bias, bool wants_slopes,
    bool wants_sinks) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, start, end, key_valid, tiles, tile_count);
  const Features features =
      features_of(shape, spans, {positions, dense, bias, alibi_slopes, sinks, seed}, slopes_by_sequence, dropout_p);
  for (const Tensor* tensor : {&grad_out, &out}) {
    require(tensor->dim() == 4 && tensor->dtype() == q.dtype() && tensor->size(0) == shape.batch &&
                tensor->size(1) == shape.heads && tensor->size(2) == shape.q_len && tensor->size(3) == shape.value_dim,
            "attention: out and its gradient must have the shape and dtype of the output");
    require(last_is_contiguous(*tensor), "attention: the last dimension of out and its gradient must be contiguous");
  }
  const int64_t rows = shape.batch * shape.heads * shape.q_len;
  const auto is_dense = [&](const Tensor& tensor) {
    return tensor.dtype() == DType::float32 && tensor.dim() == 3 && tensor.size(0) == shape.batch &&
           tensor.size(1) == shape.heads && tensor.size(2) == shape.q_len &&
           (rows == 0 ||
            ((shape.q_len == 1 || tensor.stride(2) == 1) && (shape.heads == 1 || tensor.stride(1) == shape.q_len) &&
             (shape.batch == 1 || tensor.stride(0) == shape.heads * shape.q_len)));
  };
  require(is_dense(lse) && (grad_lse.numel() == 0 || is_dense(grad_lse)),
          "attention: lse and its gradient must be contiguous float32 (batch, heads, q_len)");
  Tensor grad_q = empty_in_order_of(q, shape.head_dim);
  Tensor grad_k = empty_in_order_of(k, shape.head_dim);
  Tensor grad_v = empty_in_order_of(v, shape.value_dim);
  Tensor grad_bias = gradient_of(bias, wants_bias);
  Tensor grad_slopes = gradient_of(alibi_slopes, wants_slopes);
  Tensor grad_sinks = gradient_of(sinks, wants_sinks);
  if (shape.batch > 0 && shape.heads > 0 && shape.q_len > 0) {
    AttentionBackward p{shape,
                        spans,
                        features,
                        rows_of(q),
                        rows_of(k),
                        rows_of(v),
                        rows_of(out),
                        rows_of(grad_out),
                        rows_of(grad_q),
                        rows_of(grad_k),
                        rows_of(grad_v),
                        lse.data<float>(),
                        grad_lse.data_or_null<float>()};
    if (features.bias.data != nullptr && wants_bias) {
      advise_huge_pages(grad_bias, bytes_of(features.bias_element));
      p.grad_bias = grad_bias.data();
      const int64_t full[4] = {shape.batch, shape.heads, shape.q_len, shape.k_len};
      for (int d = 0; d < 4; d++) {
        p.bias_sizes[d] = bias.size(d);
        p.bias_is_shared = p.bias_is_shared || bias.size(d) != full[d];
      }
    }
    if (features.alibi_slopes.data != nullptr && wants_slopes) p.grad_slopes = grad_slopes.data<float>();
    if (features.sinks.data != nullptr && wants_sinks) p.grad_sinks = grad_sinks.data<float>();
    attention_backward(p, torch_threads());
  } else {  // no row: nothing arrives anywhere
    for (const Tensor* gradient : {&grad_q, &grad_k, &grad_v, &grad_bias, &grad_slopes, &grad_sinks}) {
      const int64_t bytes = gradient->dtype() == DType::float32 ? 4 : 2;
      if (gradient->numel() != 0) std::memset(gradient->data(), 0, gradient->numel() * bytes);
    }
  }
  return {std::move(grad_q),    std::move(grad_k),      std::move(grad_v),
          std::move(grad_bias), std::move(grad_slopes), std::move(grad_sinks)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", "CPU");
  library.implement<&attention_forward_cpu>("attention_forward");
  library.implement<&attention_backward_cpu>("attention_backward");
  return true;
}();

}  // namespace
}  // namespace maskops
