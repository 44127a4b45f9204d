// Bindings of span attention on a CUDA device.
#include "attention.h"

#include <cmath>
#include <tuple>

namespace maskops {
namespace {

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, double softcap) {
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
  require(shape.q_len < INT32_MAX - 128 && shape.k_len < INT32_MAX - 128, "attention: too many queries or keys");
  require(shape.head_dim < INT32_MAX / 2 && shape.value_dim < INT32_MAX / 2, "attention: head_dim is too large");
  for (const Tensor* tensor : {&q, &k, &v}) {
    require(last_is_contiguous(*tensor), "attention: the last dimension must be contiguous");
  }
  return shape;
}

struct Plan {
  const Tensor &start, &end, &key_valid, &tiles, &tile_count, &key_tiles, &order;
};

DeviceSpans spans_of(const AttentionShape& shape, const Plan& plan) {
  const auto& [start, end, key_valid, tiles, tile_count, key_tiles, order] = plan;
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
  DeviceSpans spans{};
  spans.start = start.data<int32_t>();
  spans.end = end.data<int32_t>();
  spans.key_valid = key_valid.data<uint8_t>();
  spans.span_stride = start.stride(0);
  spans.batch_stride = plan_batch == 1 ? 0 : start.stride(1);
  spans.key_valid_batch_stride = plan_batch == 1 ? 0 : key_valid.stride(0);
  spans.n_spans = static_cast<int32_t>(n_spans);
  spans.plan_batch = static_cast<int32_t>(plan_batch);
  spans.tiles = tiles.data<int32_t>();
  spans.tile_count = tile_count.data<int32_t>();
  spans.capacity = static_cast<int32_t>(tiles.size(0));
  spans.tile_width = static_cast<int32_t>(tiles.size(1));
  if (order.numel() != 0) {
    require(order.dim() == 1 && order.dtype() == DType::int32 && order.size(0) == tiles.size(0) && adjacent(order),
            "attention: order must be int32, a number for each item of the work list");
    spans.order = order.data<int32_t>();
  }
  if (key_tiles.numel() != 0) {
    const int64_t n_tiles = (shape.k_len + 63) / 64;
    require(key_tiles.dim() == 4 && key_tiles.dtype() == DType::int32 && key_tiles.size(0) == n_spans &&
                key_tiles.size(1) == plan_batch && key_tiles.size(2) == n_tiles && key_tiles.size(3) == 4 &&
                key_tiles.stride(3) == 1 && (n_tiles == 1 || key_tiles.stride(2) == 4) &&
                (plan_batch == 1 || key_tiles.stride(1) == 4 * n_tiles) &&
                (n_spans == 1 || key_tiles.stride(0) == 4 * n_tiles * plan_batch),
            "attention: key_tiles must be contiguous int32 (n_spans, batch, key tiles, 4)");
    spans.key_tiles = key_tiles.data<int32_t>();
  }
  return spans;
}

struct FeatureTensors {
  const Tensor &positions, &dense, &bias, &alibi_slopes, &sinks, &seed;
};

PerHead per_head_of(const AttentionShape& shape, const Tensor& tensor, const char* message) {
  if (tensor.numel() == 0) return {};
  require(tensor.dim() == 2 && tensor.dtype() == DType::float32 && tensor.size(1) == shape.heads, message);
  return {tensor.data<float>(), tensor.stride(0), tensor.stride(1), tensor.size(0), false};
}

// `sequences` becomes the scratch of a shared plan's dropout.
DeviceFeatures features_of(const Call& call, const AttentionShape& shape, const DeviceSpans& spans,
                           const FeatureTensors& tensors, bool slopes_by_sequence, double dropout_p,
                           Tensor& sequences) {
  DeviceFeatures features{};
  const int64_t full[4] = {shape.batch, shape.heads, shape.q_len, shape.k_len};
  features.bias =
      device_broadcast(tensors.bias, full, "attention: bias must broadcast to (batch, heads, q_len, k_len)");
  if (features.bias.data != nullptr) features.bias_element = element_of(tensors.bias);
  if (tensors.dense.numel() != 0) {
    const int64_t words[4] = {shape.batch, shape.heads, shape.q_len, (shape.k_len + 31) / 32};
    require(tensors.dense.dim() == 4 && tensors.dense.dtype() == DType::int32 && tensors.dense.size(2) == words[2] &&
                tensors.dense.size(3) == words[3] && adjacent(tensors.dense),
            "attention: dense must be int32 words of 32 keys, (batch, heads, q_len, words)");
    features.dense = device_broadcast(tensors.dense, words, "attention: dense must broadcast over batch and heads");
    features.dense_is_bits = true;
  }
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
  const bool has_rows = shape.batch > 0 && shape.q_len > 0;
  if (features.alibi_slopes.data != nullptr && has_rows) {
    require(features.positions != nullptr, "attention: alibi_slopes need positions");
    features.alibi_slopes.by_sequence = slopes_by_sequence;
    const int64_t outer = features.alibi_slopes.outer;
    require(slopes_by_sequence ? outer < INT32_MAX : outer == 1 || outer == shape.batch,
            "attention: alibi_slopes must be (1 or batch, heads)");
  }
  require(0.0 <= dropout_p && dropout_p < 1.0, "attention: dropout_p must be in [0, 1)");
  features.kept_scale = 1.0f;
  if (dropout_p > 0.0 && has_rows) {
    require(features.positions != nullptr, "attention: dropout needs positions");
    require(tensors.seed.numel() == 1 && tensors.seed.dtype() == DType::int64, "attention: seed must be one int64");
    features.has_dropout = true;
    features.last_dropped = static_cast<uint32_t>(std::ceil(dropout_p * 0x1p32) - 1.0);
    features.kept_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    features.seed = tensors.seed.data<int64_t>();
    if (spans.plan_batch == 1 && shape.batch > 1) {
      sequences = call.empty({1}, DType::int32);
      features.sequences = sequences.data<int32_t>();
      count_sequences_cuda(features.positions + 2 * features.positions_stride, shape.q_len, sequences.data<int32_t>(),
                           call.stream());
    }
  }
  return features;
}

bool has_work(const AttentionShape& shape) { return shape.batch > 0 && shape.heads > 0 && shape.q_len > 0; }

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                             const Tensor& end, const Tensor& key_valid, const Tensor& tiles,
                                             const Tensor& tile_count, const Tensor& key_tiles, const Tensor& order,
                                             const Tensor& positions, const Tensor& dense, const Tensor& bias,
                                             const Tensor& alibi_slopes, const Tensor& sinks, const Tensor& seed,
                                             bool slopes_by_sequence, double softmax_scale, double softcap,
                                             double dropout_p) {
  const Call call(q);
  call.require_here({&k, &v, &start, &end, &key_valid, &tiles, &tile_count, &key_tiles, &order, &positions, &dense,
                     &bias, &alibi_slopes, &sinks, &seed});
  DeviceAttentionForward p{};
  AttentionShape& shape = p.call.shape;
  shape = shape_of(q, k, v, softmax_scale, softcap);
  p.call.spans = spans_of(shape, {start, end, key_valid, tiles, tile_count, key_tiles, order});
  Tensor sequences;
  p.call.features = features_of(call, shape, p.call.spans, {positions, dense, bias, alibi_slopes, sinks, seed},
                                slopes_by_sequence, dropout_p, sequences);
  Tensor out = empty_in_order_of(q, shape.value_dim);
  Tensor lse = call.empty({shape.batch, shape.heads, shape.q_len}, DType::float32);
  if (has_work(shape)) {
    p.call.q = device_rows(q);
    p.call.k = device_rows(k);
    p.call.v = device_rows(v);
    p.out = device_rows(out);
    p.lse = lse.data<float>();
    attention_forward_cuda(p, call.stream());
  }
  return {std::move(out), std::move(lse)};
}

// A new contiguous tensor for the gradient of an argument, or an empty one where it is not wanted.
Tensor gradient_of(const Call& call, const Tensor& argument, bool is_wanted) {
  if (!is_wanted) return call.empty({0}, DType::float32);
  const int64_t dim = argument.dim();
  require(dim <= 4, "attention: a gradient has at most 4 dimensions");
  int64_t strides[4], running = 1;
  for (int64_t d = dim; d-- > 0;) {
    strides[d] = running;
    running *= std::max<int64_t>(argument.size(d), 1);
  }
  return call.empty_strided(dim, argument.sizes(), strides, argument.dtype());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& start, const Tensor& end, const Tensor& key_valid,
    const Tensor& tiles, const Tensor& tile_count, const Tensor& key_tiles, const Tensor& order,
    const Tensor& positions, const Tensor& dense, const Tensor& bias, const Tensor& alibi_slopes, const Tensor& sinks,
    const Tensor& seed, bool slopes_by_sequence, double softmax_scale, double softcap, double dropout_p,
    bool wants_bias, bool wants_slopes, bool wants_sinks) {
  const Call call(q);
  call.require_here({&grad_out, &grad_lse, &k, &v, &out, &lse, &start, &end, &key_valid, &tiles, &tile_count,
                     &key_tiles, &order, &positions, &dense, &bias, &alibi_slopes, &sinks, &seed});
  DeviceAttentionBackward p{};
  AttentionShape& shape = p.call.shape;
  shape = shape_of(q, k, v, softmax_scale, softcap);
  p.call.spans = spans_of(shape, {start, end, key_valid, tiles, tile_count, key_tiles, order});
  Tensor sequences;
  p.call.features = features_of(call, shape, p.call.spans, {positions, dense, bias, alibi_slopes, sinks, seed},
                                slopes_by_sequence, dropout_p, sequences);
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
  Tensor grad_bias = gradient_of(call, bias, wants_bias);
  Tensor grad_slopes = gradient_of(call, alibi_slopes, wants_slopes);
  Tensor grad_sinks = gradient_of(call, sinks, wants_sinks);
  if (has_work(shape)) {
    wants_bias = wants_bias && bias.numel() != 0;
    wants_slopes = wants_slopes && alibi_slopes.numel() != 0;
    wants_sinks = wants_sinks && sinks.numel() != 0;
    const Tensor of_rows = call.empty({6, rows}, DType::float32);
    float* const scratch = of_rows.data<float>();
    p.call.q = device_rows(q);
    p.call.k = device_rows(k);
    p.call.v = device_rows(v);
    p.out = device_rows(out);
    p.grad_out = device_rows(grad_out);
    p.grad_q = device_rows(grad_q);
    p.grad_k = device_rows(grad_k);
    p.grad_v = device_rows(grad_v);
    p.lse = lse.data<float>();
    p.grad_lse = grad_lse.data_or_null<float>();
    p.row_maximum = scratch;
    p.row_log_sum = scratch + rows;
    p.row_delta = scratch + 2 * rows;
    p.row_share = scratch + 3 * rows;
    if (wants_bias) {
      p.grad_bias = grad_bias.data();
      std::copy_n(bias.sizes(), 4, p.bias_sizes);
    }
    if (wants_slopes) {
      p.grad_slopes = grad_slopes.data<float>();
      p.row_grad_slopes = scratch + 4 * rows;
    }
    if (wants_sinks) {
      p.grad_sinks = grad_sinks.data<float>();
      p.row_grad_sinks = scratch + 5 * rows;
    }
    attention_backward_cuda(p, call.stream());
  } else {  // no row: nothing arrives anywhere
    for (const Tensor* gradient : {&grad_q, &grad_k, &grad_v, &grad_bias, &grad_slopes, &grad_sinks}) {
      const int64_t bytes = gradient->dtype() == DType::float32 ? 4 : 2;
      if (gradient->numel() != 0) clear_cuda(gradient->data(), gradient->numel() * bytes, call.stream());
    }
  }
  return {std::move(grad_q),    std::move(grad_k),      std::move(grad_v),
          std::move(grad_bias), std::move(grad_slopes), std::move(grad_sinks)};
}

const bool registered = [] {
  static OperatorLibrary library("maskops", DEVICE_KEY);
  library.implement<&attention_forward>("attention_forward_cuda");
  library.implement<&attention_backward>("attention_backward_cuda");
  return true;
}();

}  // namespace
}  // namespace maskops
