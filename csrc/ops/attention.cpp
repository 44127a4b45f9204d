// Bindings of span attention.
#include "attention.h"

#include <cstring>
#include <string>
#include <tuple>

#include "../cpu/attention.h"
#include "attention_spans.h"

namespace maskops {
namespace {

Features features_of(const AttentionShape& shape, const Spans& spans, const FeatureTensors& tensors,
                     bool slopes_by_sequence, double dropout_p) {
  auto features = score_features<Features>(shape, spans.plan_batch, tensors, slopes_by_sequence);
  require(tensors.dense.numel() == 0 || tensors.dense.dtype() == DType::boolean, "attention: dense must be bool");
  const int64_t full[4] = {shape.batch, shape.heads, shape.q_len, shape.k_len};
  features.dense = broadcast_of(tensors.dense, full, "attention: dense must broadcast to (batch, heads, q_len, k_len)");
  int32_t last = -1;  // of the ordinals of sequences
  const int64_t placed = features.positions == nullptr ? 0 : spans.plan_batch;
  for (int64_t batch = 0; batch < placed; batch++) {
    const int32_t* ordinals =
        features.positions + 2 * features.positions_stride + batch * features.positions_batch_stride;
    for (int64_t row = 0; row < shape.q_len; row++) last = std::max(last, ordinals[row]);
  }

  const PerHead& slopes = features.alibi_slopes;
  if (slopes.by_sequence && last >= slopes.outer) {
    throw std::invalid_argument("alibi_slopes has " + std::to_string(slopes.outer) + " rows, the plan has " +
                                std::to_string(static_cast<int64_t>(last) + 1) +
                                " sequences: expected slopes (heads,) or (sequences, heads)");
  }
  const DropoutNumbers dropout = dropout_numbers(shape, tensors.seed, features.positions, dropout_p);
  if (dropout.is_on) {
    const bool shared = spans.plan_batch == 1 && shape.batch > 1;
    features.dropout = {true, dropout.last_dropped, dropout.kept_scale,
                        static_cast<uint64_t>(*tensors.seed.data<int64_t>()),
                        shared ? static_cast<uint32_t>(last) + 1 : 0};
  }
  return features;
}

std::tuple<Tensor, Tensor> forward(const AttentionShape& shape, const Spans& spans, const Features& features,
                                   const Tensor& q, const Tensor& k, const Tensor& v) {
  Tensor out = empty_in_order_of(q, shape.value_dim);
  Tensor lse = Tensor::empty({shape.batch, shape.heads, shape.q_len}, DType::float32);
  if (has_work(shape)) {
    attention_forward({shape, spans, features, rows_of(q), rows_of(k), rows_of(v), rows_of(out), lse.data<float>()},
                      torch_threads());
  }
  return {std::move(out), std::move(lse)};
}

std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& start,
                                                 const Tensor& end, const Tensor& key_valid, const Tensor& tiles,
                                                 const Tensor& tile_count, const Tensor&, const Tensor&,
                                                 const Tensor& positions, const Tensor& dense, const Tensor& bias,
                                                 const Tensor& alibi_slopes, const Tensor& sinks, const Tensor& seed,
                                                 bool slopes_by_sequence, double softmax_scale, double softcap,
                                                 double dropout_p) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, {start, end, key_valid, tiles, tile_count});
  return forward(
      shape, spans,
      features_of(shape, spans, {positions, dense, bias, alibi_slopes, sinks, seed}, slopes_by_sequence, dropout_p), q,
      k, v);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& start, const Tensor& end, const Tensor& key_valid,
    const Tensor& tiles, const Tensor& tile_count, const Tensor&, const Tensor&, const Tensor& positions,
    const Tensor& dense, const Tensor& bias, const Tensor& alibi_slopes, const Tensor& sinks, const Tensor& seed,
    bool slopes_by_sequence, double softmax_scale, double softcap, double dropout_p, bool wants_bias, bool wants_slopes,
    bool wants_sinks) {
  const AttentionShape shape = attention_shape(q, k, v, softmax_scale, softcap);
  const Spans spans = spans_of(shape, {start, end, key_valid, tiles, tile_count});
  const FeatureTensors tensors{positions, dense, bias, alibi_slopes, sinks, seed};
  const Features features = features_of(shape, spans, tensors, slopes_by_sequence, dropout_p);
  check_outputs(shape, q.dtype(), out, grad_out, lse, &grad_lse);
  Gradients gradients(shape, q, k, v, tensors, wants_bias, wants_slopes, wants_sinks);
  auto& [grad_q, grad_k, grad_v, grad_bias, grad_slopes, grad_sinks] = gradients;
  if (has_work(shape)) {
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
    for (const Tensor* gradient : {&grad_q, &grad_k, &grad_v, &grad_bias, &grad_slopes, &grad_sinks}) clear(*gradient);
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
