// Bindings of span attention on a CUDA device.
#include "attention.h"

#include <tuple>

namespace maskops {
namespace {

DeviceSpans spans_of(const AttentionShape& shape, const SpanTensors& plan, const Tensor& key_tiles,
                     const Tensor& order) {
  auto spans = planned_spans<DeviceSpans>(shape, plan);
  const int64_t n_spans = spans.n_spans, plan_batch = spans.plan_batch, capacity = plan.tiles.size(0);
  spans.tile_count = plan.tile_count.data<int32_t>();
  spans.capacity = static_cast<int32_t>(capacity);
  if (order.numel() != 0) {
    require(order.dim() == 1 && order.dtype() == DType::int32 && order.size(0) == capacity && adjacent(order),
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

// `sequences` becomes the scratch of a shared plan's dropout.
DeviceFeatures features_of(const Call& call, const AttentionShape& shape, const DeviceSpans& spans,
                           const FeatureTensors& tensors, bool slopes_by_sequence, double dropout_p,
                           Tensor& sequences) {
  auto features = score_features<DeviceFeatures>(shape, spans.plan_batch, tensors, slopes_by_sequence);
  if (tensors.dense.numel() != 0) {
    const int64_t words[4] = {shape.batch, shape.heads, shape.q_len, (shape.k_len + 31) / 32};
    require(tensors.dense.dim() == 4 && tensors.dense.dtype() == DType::int32 && tensors.dense.size(2) == words[2] &&
                tensors.dense.size(3) == words[3] && adjacent(tensors.dense),
            "attention: dense must be int32 words of 32 keys, (batch, heads, q_len, words)");
    features.dense = broadcast_of(tensors.dense, words, "attention: dense must broadcast over batch and heads");
    features.dense_is_bits = true;
  }
  const DropoutNumbers dropout = dropout_numbers(shape, tensors.seed, features.positions, dropout_p);
  features.has_dropout = dropout.is_on;
  features.last_dropped = dropout.last_dropped;
  features.kept_scale = dropout.kept_scale;
  if (dropout.is_on) {
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
  shape = attention_shape(q, k, v, softmax_scale, softcap);
  p.call.spans = spans_of(shape, {start, end, key_valid, tiles, tile_count}, key_tiles, order);
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
  shape = attention_shape(q, k, v, softmax_scale, softcap);
  p.call.spans = spans_of(shape, {start, end, key_valid, tiles, tile_count}, key_tiles, order);
  Tensor sequences;
  const FeatureTensors tensors{positions, dense, bias, alibi_slopes, sinks, seed};
  p.call.features = features_of(call, shape, p.call.spans, tensors, slopes_by_sequence, dropout_p, sequences);
  check_outputs(shape, q.dtype(), out, grad_out, lse, &grad_lse);
  Gradients gradients(shape, q, k, v, tensors, wants_bias, wants_slopes, wants_sinks);
  auto& [grad_q, grad_k, grad_v, grad_bias, grad_slopes, grad_sinks] = gradients;
  if (has_work(shape)) {
    wants_bias = wants_bias && bias.numel() != 0;
    wants_slopes = wants_slopes && alibi_slopes.numel() != 0;
    wants_sinks = wants_sinks && sinks.numel() != 0;
    const int64_t rows = shape.batch * shape.heads * shape.q_len;
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
