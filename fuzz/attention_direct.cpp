// Attention in plain calls: programs of a mask, offsets that come from outside, plans; rows of a batch and packed ones.
// Each way gives what the way beside it gives, bit for bit.
#include <cmath>
#include <limits>
#include <string>

#include "targets.h"

namespace fuzz {
namespace {

enum class Kind { plan, pattern, packed };

// What decides which keys a row sees; an operator takes the tensors of a plan, or offsets and text.
struct Decision {
  Kind kind;
  Plan plan;
  Value queries, keys;
  std::string program;

  void add_to(Call& call) const {
    if (kind == Kind::plan) {
      call.add(plan.start).add(plan.end).add(plan.key_valid).add(plan.tiles).add(plan.tile_count);
      return;
    }
    if (kind == Kind::packed) call.add(queries).add(keys);
    call.add(program);
  }
};

// The same attention by the operator of all features, none of which is there.
void compare_with_features(Input& input, const Value& q, const Value& k, const Value& v, const Plan& plan, double scale,
                           const std::vector<Value>& expected) {
  const Value absent = Value::dense({0}, DType::int32), no_floats = Value::dense({0}, DType::float32);
  Call call;
  call.add(q).add(k).add(v).add(plan.start).add(plan.end).add(plan.key_valid).add(plan.tiles).add(plan.tile_count);
  call.add(absent).add(absent).add(absent).add(Value::dense({0}, DType::boolean)).add(no_floats).add(no_floats);
  call.add(no_floats).add(Value::dense({0}, DType::int64)).add(false).add(scale).add(0.0).add(0.0);
  std::vector<Value> results;
  if (!run_twice(input, call, "attention_forward", 2, results)) {
    if (call.out_of_memory()) return;
    fail("attention_forward refuses what attention_direct took: " + call.error());
  }
  require_same(expected[0], results[0], "out of attention_direct and attention_forward");
  require_same(expected[1], results[1], "lse of attention_direct and attention_forward");
}

}  // namespace

void fuzz_attention_direct(Input& input) {
  const bool wild = input.once_in(8);
  const Kind kind = input.of({Kind::packed, Kind::packed, Kind::pattern, Kind::plan});
  const bool packed = kind == Kind::packed ? !input.once_in(32) : input.once_in(4);
  const int64_t batch = packed ? 1 : input.of({1, 2, 1, 3, 0});
  const int64_t kv_heads = input.of({1, 2, 1, 0}), heads = kv_heads * input.of({1, 2, 3, 9});
  const int64_t q_len = input.length(300), k_len = input.once_in(3) ? input.length(300) : q_len;
  const int64_t head_dim = input.of({8, 1, 5, 16, 17, 33, 0}), value_dim = input.of({8, 16, 3, 17, 40, 1, 0});
  const DType dtype = input.floating();
  const auto rows = [&](int64_t n_heads, int64_t length, int64_t width) {
    const std::vector<int64_t> in_batch{batch, n_heads, length, width}, in_pack{length, n_heads, width};
    return input.misshapen(input.floats(packed ? in_pack : in_batch, dtype, wild));
  };
  const Value q = rows(heads, q_len, head_dim), k = rows(kv_heads, k_len, head_dim),
              v = rows(kv_heads, k_len, value_dim);

  const Value absent = Value::dense({0}, DType::int64);
  Decision decision{kind, {absent, absent, absent, absent, absent, absent, absent}, absent, absent, {}};
  if (kind == Kind::plan) {
    decision.plan = make_plan(input, batch, q_len, k_len, input.once_in(3));
    if (input.once_in(2)) corrupt(input, decision.plan, q_len, k_len);
  } else {
    decision.program = make_spans(input, q_len, k_len);
  }
  if (kind == Kind::packed) {
    const int64_t documents = input.below(8);
    decision.queries = make_offsets(input, q_len, documents);
    if (q_len != k_len || input.once_in(2)) decision.keys = make_offsets(input, k_len, documents);
  }
  const double default_scale = std::numeric_limits<double>::quiet_NaN();
  const double scale = input.of({default_scale, 0.5, wild ? input.real() : 1.0});

  // Once saving what the backward pass needs, once not.
  const char* const saving[] = {"attention_direct", "attention_pattern_saving", "attention_packed_saving"};
  const char* const alone[] = {nullptr, "attention_pattern", "attention_packed"};
  const char* const of_gradients[] = {"attention_direct_backward", "attention_pattern_backward",
                                      "attention_packed_backward"};
  const int which = static_cast<int>(kind);
  Call forward;
  forward.add(q).add(k).add(v);
  decision.add_to(forward);
  forward.add(scale);
  std::vector<Value> results, again;
  if (!run_twice(input, forward, saving[which], kind == Kind::packed ? 3 : 2, results)) return;
  if (kind != Kind::plan) {
    if (forward.run(alone[which], 1, again)) {
      require_same(results[0], again[0], "out with and without what the backward pass needs");
    } else if (!forward.out_of_memory()) {
      fail(std::string(alone[which]) + " refuses what " + saving[which] + " took: " + forward.error());
    }
  } else if (!packed && scale == scale) {
    compare_with_features(input, q, k, v, decision.plan, scale, results);
  }

  const Value out = input.misshapen(results[0]), lse = input.misshapen(results[1]);
  for (int64_t times = input.below(3); times > 0 && lse.dtype == DType::float32 && lse.elements > 0; times--) {
    lse.data<float>()[input.below(lse.elements)] = static_cast<float>(input.real());
  }
  if (kind == Kind::plan && input.once_in(4)) corrupt(input, decision.plan, q_len, k_len);
  if (kind != Kind::plan && input.once_in(16)) decision.program = make_spans(input, q_len, k_len);
  if (kind == Kind::packed) {
    decision.queries = input.misshapen(results[2]);
    const bool holds_offsets = decision.queries.dtype == DType::int64 && decision.queries.elements > 0;
    for (int64_t times = input.below(3); holds_offsets && times > 0; times--) {
      set(decision.queries, input.below(decision.queries.elements), input.hostile(q_len));
    }
  }
  Call backward;
  backward.add(rows(heads, q_len, value_dim)).add(q).add(k).add(v).add(out).add(lse);
  if (kind == Kind::packed) {
    backward.add(decision.queries).add(decision.program);
  } else {
    decision.add_to(backward);
  }
  backward.add(scale);
  run_twice(input, backward, of_gradients[which], 3, results);
}

}  // namespace fuzz
