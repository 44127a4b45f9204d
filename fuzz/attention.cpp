// Span attention: plans that a mask made, plans that nobody made, and plans with a few integers changed, forward and
// backward.
#include "targets.h"

namespace fuzz {

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
  const auto add_plan = [&](Call& call) {
    call.add(plan.start).add(plan.end).add(plan.key_valid).add(plan.tiles).add(plan.tile_count);
    call.add(scale).add(softcap);
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
  run_twice(input, backward, "attention_backward", 3, results);
}

}  // namespace fuzz
