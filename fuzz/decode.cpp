// The cache of keys and values: lengths, pages and rows that point anywhere, appended to and attended over.
#include <algorithm>
#include <limits>

#include "targets.h"

namespace fuzz {
namespace {

DType index_dtype(Input& input) { return input.of({DType::int32, DType::int64}); }

void fill(Input& input, const Value& value, int64_t count) {
  if (value.dtype != DType::int32 && value.dtype != DType::int64) return;
  for (int64_t i = 0; i < value.elements; i++) {
    set(value, i, input.once_in(32) ? input.hostile(count) : input.below(std::max<int64_t>(count, 1)));
  }
}

// Queries that see their whole sequence, by the operator that takes nothing else and by the one that takes all.
void decode_directly(Input& input, const Value& q, const Value& k_cache, const Value& v_cache, const Value& lengths) {
  const double default_scale = std::numeric_limits<double>::quiet_NaN();
  const double scale = input.of({0.5, default_scale, input.real()});
  Call direct;
  direct.add(q).add(k_cache).add(v_cache).add(lengths).add(scale);
  std::vector<Value> results, expected;
  if (!run_twice(input, direct, "decode_direct", 1, results) || scale != scale) return;
  const Value absent = Value::dense({0}, DType::float32);
  Call full;
  full.add(q).add(k_cache).add(v_cache).add(lengths);
  for (int i = 0; i < 10; i++) full.add(absent);
  full.add(scale).add(0.0);
  if (full.run("decode_forward", 2, expected)) {
    require_same(results[0], expected[0], "out of decode_direct and decode_forward");
  } else if (!full.out_of_memory()) {
    fail("decode_forward refuses what decode_direct took: " + full.error());
  }
}

}  // namespace

void fuzz_decode(Input& input) {
  const bool wild = input.once_in(8), paged = input.once_in(2);
  const int64_t batch = input.of({1, 2, 3, 0}), kv_heads = input.of({1, 2, 0}), group = input.of({1, 2, 3, 9});
  const int64_t rows = paged ? input.below(9) : input.once_in(4) ? input.below(4) : batch;
  const int64_t page = paged ? input.of({1, 4, 16, 64, 0, 3}) : input.length(300) * (input.once_in(4) ? 4 : 1);
  const int64_t places = paged ? input.below(12) : 1, capacity = places * page;
  const int64_t head_dim = input.of({8, 1, 5, 16, 33, 64, 0}), value_dim = input.of({8, 16, 3, 40, 64, 1, 0});
  const int64_t q_len = input.of({1, 1, 2, 5, 17, 0});
  const DType dtype = input.floating();
  const Value k_cache = input.misshapen(input.floats({rows, kv_heads, page, head_dim}, dtype, wild));
  const Value v_cache = input.misshapen(input.floats({rows, kv_heads, page, value_dim}, dtype, wild));
  const Value absent = Value::dense({0}, DType::int32), no_floats = Value::dense({0}, DType::float32);
  Value table = absent, index = absent;
  if (paged) {
    table = input.misshapen(input.integers({batch, places}, index_dtype(input)));
    fill(input, table, rows);
  } else if (input.once_in(2) || rows != batch) {
    index = input.misshapen(input.integers({batch}, index_dtype(input)));
    fill(input, index, rows);
  }
  const Value lengths = input.misshapen(input.integers({batch}, index_dtype(input)));
  fill(input, lengths, capacity + 1);
  std::vector<Value> results;

  if (input.once_in(2)) {
    const int64_t added = input.of({1, 2, 5, 0, 40});
    Call append;
    append.add(k_cache).add(v_cache);
    append.add(input.misshapen(input.floats({batch, kv_heads, added, head_dim}, dtype, wild)));
    append.add(input.misshapen(input.floats({batch, kv_heads, added, value_dim}, dtype, wild)));
    append.add(lengths).add(table).add(index);
    run_twice(input, append, "append_kv", 0, results, {k_cache, v_cache});
  }

  const int64_t heads = kv_heads * group;
  Value leftpad = absent;
  if (input.once_in(3)) {
    leftpad = input.misshapen(input.integers({batch}, index_dtype(input)));
    fill(input, leftpad, capacity + 1);
  }
  Plan plan{absent, absent, absent, absent, absent, absent, absent};
  if (input.once_in(2)) {
    plan = make_plan(input, batch, q_len, capacity, input.once_in(2));
    if (input.once_in(2)) corrupt(input, plan, q_len, capacity);
  }
  Value dense = Value::dense({0}, DType::boolean), diagonal = absent, slopes = no_floats, sinks = no_floats;
  const auto once = [&](int64_t size) { return input.once_in(3) ? 1 : size; };
  if (input.once_in(4)) {
    dense = input.misshapen(input.integers({once(batch), once(heads), q_len, capacity}, DType::boolean));
    for (int64_t i = 0; i < dense.elements && dense.dtype == DType::boolean; i += 3) set(dense, i, 1);
  }
  if (input.once_in(4)) {
    slopes = input.misshapen(input.floats({once(batch), heads}, DType::float32, wild));
    diagonal = input.misshapen(input.integers({once(batch), q_len}, DType::int32));
    fill(input, diagonal, capacity);
  }
  if (input.once_in(4)) sinks = input.misshapen(input.floats({heads}, DType::float32, wild));
  Call call;
  const Value q = input.misshapen(input.floats({batch, heads, q_len, head_dim}, dtype, wild));
  call.add(q).add(k_cache).add(v_cache);
  call.add(lengths).add(leftpad).add(table).add(index).add(plan.start).add(plan.end).add(plan.key_valid);
  call.add(dense).add(diagonal).add(slopes).add(sinks);
  call.add(wild ? input.real() : 0.5).add(input.once_in(4) ? (wild ? input.real() : 2.0) : 0.0);
  run_twice(input, call, "decode_forward", 2, results);
  if (!paged && index.elements == 0) decode_directly(input, q, k_cache, v_cache, lengths);
}

}  // namespace fuzz
