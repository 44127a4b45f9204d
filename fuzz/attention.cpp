// Span attention: plans that a mask made, plans that nobody made, and plans with a few integers changed, forward and
// backward.
#include "targets.h"

namespace fuzz {
namespace {

struct Features {
  Value positions, dense, bias, slopes, sinks, seed;
  bool by_sequence = false;
  double dropout_p = 0.0;
};

// Each is absent, right, or (rarely) of another shape; positions and the bytes of the dense mask may be anything.
Features make_features(Input& input, const Plan& plan, int64_t batch, int64_t heads, int64_t q_len, int64_t k_len,
                       bool wild) {
  const Value absent = Value::dense({0}, DType::float32);
  Features features{absent, absent, absent, absent, absent, absent};
  if (input.once_in(2)) {
    std::vector<int64_t> sizes{batch, heads, q_len, k_len};
    for (int64_t& size : sizes) size = input.once_in(3) ? 1 : size;
    features.bias = input.misshapen(input.floats(sizes, input.floating(), wild));
  }
  if (input.once_in(4)) {
    const std::vector<int64_t> sizes{input.once_in(2) ? 1 : batch, input.once_in(2) ? 1 : heads, q_len, k_len};
    features.dense = input.misshapen(Value::dense(sizes, DType::boolean));
    const int64_t bytes = features.dense.dtype == DType::boolean ? features.dense.elements : 0;
    for (int64_t i = 0, period = 1 + input.below(7); i < bytes; i++)
      features.dense.data<uint8_t>()[i] = i % period != 0;
  }
  if (input.once_in(3)) features.sinks = input.misshapen(input.floats({1, heads}, DType::float32, wild));
  const int64_t outer = input.once_in(2) ? 1 : batch + input.below(4);
  if (input.once_in(3)) features.slopes = input.misshapen(input.floats({outer, heads}, DType::float32, wild));
  features.by_sequence = input.once_in(3);
  if (input.once_in(3)) {
    features.dropout_p = input.of({0.1, 0.5, 0.999999, 1e-12, wild ? input.real() : 0.3});
    features.seed = input.misshapen(input.integers({1}, DType::int64));
  }
  if (input.once_in(8)) return features;  // positions are missing
  features.positions = plan.positions;
  if (input.once_in(2)) {
    const int64_t plan_batch = plan.start.sizes.size() == 3 ? plan.start.sizes[1] : 1;
    features.positions = input.misshapen(input.integers({3, plan_batch, q_len}, DType::int32));
    const int64_t integers = features.positions.dtype == DType::int32 ? features.positions.elements : 0;
    for (int64_t i = 0; i < integers; i++) {
      set(features.positions, i, input.once_in(32) ? input.hostile(k_len) : i % (k_len + 1));
    }
  }
  return features;
}

}  // namespace

void fuzz_attention(Input& input) {
  const bool wild = input.once_in(8);
  const int64_t batch = input.of({1, 2, 1, 3, 0}), kv_heads = input.of({1, 2, 1, 0}), group = input.of({1, 2, 3, 9});
  const int64_t q_len = input.length(300), k_len = input.once_in(2) ? input.length(300) : q_len;
  const int64_t head_dim = input.of({8, 1, 5, 16, 17, 33, 0}), value_dim = input.of({8, 16, 3, 17, 40, 1, 0});
  const int64_t heads = kv_heads * group;
  const DType dtype = input.floating();
  const Value q = input.misshapen(input.floats({batch, heads, q_len, head_dim}, dtype, wild));
  const Value k = input.misshapen(input.floats({batch, kv_heads, k_len, head_dim}, dtype, wild));
  const Value v = input.misshapen(input.floats({batch, kv_heads, k_len, value_dim}, dtype, wild));
  Plan plan = make_plan(input, batch, q_len, k_len, input.once_in(3));
  if (input.once_in(2)) corrupt(input, plan, q_len, k_len);
  const double scale = wild ? input.real() : 0.5, softcap = input.once_in(4) ? (wild ? input.real() : 2.0) : 0.0;
  const Features features = make_features(input, plan, batch, heads, q_len, k_len, wild);
  const Value absent = Value::dense({0}, DType::int32);  // key_tiles and order are for devices
  const auto add_plan = [&](Call& call) {
    call.add(plan.start).add(plan.end).add(plan.key_valid).add(plan.tiles).add(plan.tile_count).add(absent).add(absent);
    call.add(features.positions).add(features.dense).add(features.bias).add(features.slopes).add(features.sinks);
    call.add(features.seed).add(features.by_sequence).add(scale).add(softcap).add(features.dropout_p);
  };
  Call forward;
  forward.add(q).add(k).add(v);
  add_plan(forward);
  std::vector<Value> results;
  if (!run_twice(input, forward, "attention_forward", 2, results)) return;
  const Value out = input.misshapen(results[0]), lse = input.misshapen(results[1]);
  for (int64_t times = input.below(3); times > 0 && lse.dtype == DType::float32 && lse.elements > 0; times--) {
    lse.data<float>()[input.below(lse.elements)] = static_cast<float>(input.real());
  }
  if (input.once_in(4)) corrupt(input, plan, q_len, k_len);
  Call backward;
  backward.add(input.misshapen(input.floats({batch, heads, q_len, value_dim}, dtype, wild)));
  backward.add(input.once_in(2) ? Value::dense({0}, DType::float32)
                                : input.misshapen(Value::dense({batch, heads, q_len}, DType::float32)));
  backward.add(q).add(k).add(v).add(out).add(lse);
  add_plan(backward);
  for (int i = 0; i < 3; i++) backward.add(!input.once_in(4));
  run_twice(input, backward, "attention_backward", 6, results);
}

}  // namespace fuzz
