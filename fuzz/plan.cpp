// build_plan: programs and operands of every kind; what it plans must be within its bounds and cover the rows.
#include <algorithm>
#include <string>

#include "../csrc/plan.h"
#include "targets.h"

namespace fuzz {
namespace {

struct Program {
  std::string text;
  Value operands[maskops::plan_operands];
  int used = 0;
};

std::string operand(Program& program, Value value) {
  const int index = program.used++ % maskops::plan_operands;
  program.operands[index] = std::move(value);
  return " " + std::to_string(index);
}

DType whole(Input& input) { return input.of({DType::int32, DType::int64, DType::int32, DType::uint8, DType::boolean}); }

Value lengths(Input& input, int64_t count, int64_t most) {
  Value value = input.misshapen(input.integers({count}, whole(input)));
  for (int64_t i = 0; i < value.elements; i++) {
    if (value.dtype == DType::float32 || value.dtype == DType::float64) break;
    set(value, i, input.once_in(16) ? input.hostile(most) : input.below(most + 1));
  }
  return value;
}

bool holds_integers(const Value& value) { return value.dtype != DType::float32 && value.dtype != DType::float64; }

}  // namespace

Value make_offsets(Input& input, int64_t total, int64_t documents) {
  Value value = input.misshapen(input.integers({documents + 1}, whole(input)));
  if (!holds_integers(value)) return value;
  int64_t at = 0;
  for (int64_t i = 0; i < value.elements; i++) {
    set(value, i, input.once_in(64) ? input.hostile(total) : at);
    at = std::min(total, at + input.below(2 * total / std::max<int64_t>(documents, 1) + 2));
  }
  return value;
}

namespace {

Value bits(Input& input, int64_t rows, int64_t width) {
  Value value = input.misshapen(input.integers({rows, width}, whole(input)));
  if (!holds_integers(value)) return value;
  const int64_t period = 1 + input.below(9), from = input.below(width + 1);
  for (int64_t i = 0; i < value.elements; i++) set(value, i, i >= from && i % period != 2);
  if (input.once_in(16) && value.elements > 0) set(value, input.below(value.elements), input.hostile(1));
  return value;
}

Value document_ids(Input& input, int64_t rows, int64_t width) {
  Value value = input.misshapen(input.integers({rows, width}, whole(input)));
  if (!holds_integers(value)) return value;
  int64_t id = 0;
  for (int64_t i = 0; i < value.elements; i++) {
    if (input.once_in(8)) id += static_cast<int8_t>(input.byte()) / 16;
    set(value, i, input.once_in(64) ? input.hostile(width) : id);
  }
  return value;
}

void add_layout(Input& input, Program& program, int64_t batch, int64_t q_len, int64_t k_len) {
  const int64_t rows = input.once_in(3) ? 1 : batch;
  std::string& text = program.text;
  switch (input.below(9)) {
    case 0: text += "padding_right" + operand(program, lengths(input, rows, k_len)); break;
    case 1: text += "padding_left" + operand(program, lengths(input, rows, k_len)); break;
    case 2: text += "padding_mask" + operand(program, bits(input, rows, k_len)); break;
    case 3: text += "key_lengths" + operand(program, lengths(input, rows, k_len)); break;
    case 4:
      text += "key_length " + std::to_string(input.once_in(8) ? input.hostile(k_len) : input.below(k_len + 1));
      break;
    case 5: text += "key_mask" + operand(program, bits(input, rows, k_len)); break;
    case 6: text += "ids" + operand(program, document_ids(input, rows, q_len)); break;
    default: {
      const int64_t count = input.below(8);
      const std::string queries = operand(program, make_offsets(input, q_len, count));
      const bool own = input.once_in(2);
      const std::string keys = own ? operand(program, make_offsets(input, k_len, count)) : queries;
      const bool honest = !input.once_in(32);
      text += (input.once_in(2) ? "varlen" : "cu_seqlens") + queries + keys + (own == honest ? " 1" : " 0");
    }
  }
  text += ' ';
}

void add_bound(Input& input, Program& program, int64_t q_len, int64_t k_len, bool with_operands, int depth = 0) {
  std::string& text = program.text;
  const auto number = [&] {
    text += " " + std::to_string(input.once_in(8) ? input.hostile(k_len) : input.below(2 * k_len + 2) - k_len);
  };
  switch (input.below(depth > 3 ? 7 : 10)) {
    case 0: text += " first"; break;
    case 1: text += " last"; break;
    case 2: text += " diag", number(); break;
    case 3: text += " prefix", number(); break;
    case 4:
      if (with_operands) {
        text += " prefix_of" + operand(program, lengths(input, input.below(4), k_len));
      } else {
        text += " last";
      }
      break;
    case 5:
    case 6:
      text += input.once_in(2) ? " chunk_start" : " chunk_end";
      text += " " + std::to_string(input.once_in(8) ? input.hostile(k_len) : 1 + input.below(k_len + 1));
      break;
    default:
      add_bound(input, program, q_len, k_len, with_operands, depth + 1);
      add_bound(input, program, q_len, k_len, with_operands, depth + 1);
      text += input.once_in(2) ? " max" : " min";
  }
}

// Spans, and then a text that nobody wrote.
void add_spans(Input& input, Program& program, int64_t q_len, int64_t k_len, bool with_operands) {
  for (int64_t spans = input.of({1, 1, 1, 2, 3, 0}); spans > 0; spans--) {
    program.text += "span";
    add_bound(input, program, q_len, k_len, with_operands);
    add_bound(input, program, q_len, k_len, with_operands);
    if (spans > 1) program.text += ' ';
  }
  while (input.once_in(24)) {
    const int64_t at = input.below(static_cast<int64_t>(program.text.size()) + 1);
    if (input.once_in(2)) {
      program.text.insert(program.text.begin() + at, static_cast<char>(input.byte()));
    } else {
      program.text.erase(program.text.begin() + at,
                         program.text.begin() + std::min<int64_t>(at + 3, program.text.size()));
    }
  }
}

Program make_program(Input& input, int64_t batch, int64_t q_len, int64_t k_len) {
  Program program;
  for (Value& value : program.operands) value = Value::dense({0}, DType::int32);
  for (int64_t layouts = input.of({0, 1, 1, 2, 3}); layouts > 0; layouts--) {
    add_layout(input, program, batch, q_len, k_len);
  }
  add_spans(input, program, q_len, k_len, true);
  return program;
}

void check(bool condition, const char* what) {
  if (!condition) fail(std::string("build_plan: ") + what);
}

void check_plan(const std::vector<Value>& results, int64_t batch, int64_t q_len, int64_t k_len) {
  const Value &start = results[0], &end = results[1], &tiles = results[3];
  const int64_t n_spans = start.sizes[0], width = 4 + 4 * n_spans;
  for (int64_t i = 0; i < start.elements; i++) {
    const int32_t low = start.data<int32_t>()[i], high = end.data<int32_t>()[i];
    check(0 <= low && low <= high && high <= k_len, "a span is outside the keys");
  }
  for (int64_t i = 0; i < results[2].elements; i++) check(results[2].data<uint8_t>()[i] <= 1, "key_valid is no bit");
  const int64_t count = results[4].data<int32_t>()[0];
  check(0 <= count && count <= tiles.sizes[0], "more items than there is room for");
  int64_t row = 0;
  for (int64_t tile = 0; tile < count; tile++) {
    const int32_t* item = tiles.data<int32_t>() + tile * width;
    check(item[0] * q_len + item[1] == row && 1 <= item[2] && item[2] <= 128 && item[3] >= 0,
          "an item is not in order");
    row += item[2];
    for (int64_t span = 0; span < n_spans; span++) {
      const int32_t* bounds = item + 4 + 4 * span;
      check(0 <= bounds[0] && bounds[0] <= bounds[1] && bounds[1] <= bounds[2] && bounds[2] <= bounds[3] &&
                bounds[3] <= k_len,
            "the bounds of an item cross");
      for (int64_t i = 0; i < item[2]; i++) {
        const int64_t at = span * batch * q_len + item[0] * q_len + item[1] + i;
        const int32_t low = start.data<int32_t>()[at], high = end.data<int32_t>()[at];
        check(low >= high || (bounds[0] <= low && high <= bounds[3]), "a row sees more than its item");
      }
    }
  }
  check(row == batch * q_len, "the items do not cover the rows");
}

// build_plan on the program; false where it refuses.
bool plan_of(Input& input, const Program& program, int64_t batch, int64_t q_len, int64_t k_len,
             std::vector<Value>& results) {
  Call call;
  call.add(program.text);
  for (const Value& value : program.operands) call.add(value);
  call.add(batch).add(q_len).add(k_len).add(input.once_in(2)).add(input.once_in(2)).add(input.once_in(2));
  return run_twice(input, call, "build_plan", 8, results);
}

Plan arbitrary_plan(Input& input, int64_t batch, int64_t q_len, int64_t k_len) {
  const int64_t n_spans = input.of({1, 1, 2, 3}), plan_batch = input.once_in(2) ? 1 : batch;
  Plan plan;
  plan.start = Value::dense({n_spans, plan_batch, q_len}, DType::int32);
  plan.end = Value::dense({n_spans, plan_batch, q_len}, DType::int32);
  plan.key_valid = Value::dense({plan_batch, k_len}, DType::uint8);
  plan.key_tiles = plan.positions = Value::dense({0}, DType::int32);
  int64_t low = 0, width = input.below(k_len + 1);
  for (int64_t i = 0; i < plan.start.elements; i++) {
    if (input.once_in(8)) low = input.below(k_len + 1);
    if (input.once_in(8)) width = input.below(k_len + 1);
    set(plan.start, i, std::min(low, k_len));
    set(plan.end, i, std::min(low + width, k_len));
    low += input.once_in(4);
  }
  const int64_t period = 1 + input.below(9);
  for (int64_t i = 0; i < plan.key_valid.elements; i++) set(plan.key_valid, i, i % period != 1);
  std::vector<int32_t> items;
  int32_t count = 0;
  for (int64_t b = 0; b < plan_batch; b++) {
    for (int64_t row = 0, rows; row < q_len; row += rows, count++) {
      rows = std::min(q_len - row, input.once_in(2) ? 128 : 1 + input.below(128));
      for (int64_t value : {b, row, rows, rows * k_len}) items.push_back(static_cast<int32_t>(value));
      for (int64_t span = 0; span < n_spans; span++) {
        int32_t bounds[4] = {INT32_MAX, 0, INT32_MAX, 0};
        for (int64_t i = row; i < row + rows; i++) {
          const int64_t at = (span * plan_batch + b) * q_len + i;
          const int32_t from = plan.start.data<int32_t>()[at], to = plan.end.data<int32_t>()[at];
          if (from >= to) continue;
          bounds[0] = std::min(bounds[0], from);
          bounds[3] = std::max(bounds[3], to);
        }
        if (bounds[3] == 0) bounds[0] = 0;
        bounds[1] = bounds[2] = bounds[3];
        items.insert(items.end(), bounds, bounds + 4);
      }
    }
  }
  plan.tiles = Value::dense({count, 4 + 4 * n_spans}, DType::int32);
  for (size_t i = 0; i < items.size(); i++) set(plan.tiles, static_cast<int64_t>(i), items[i]);
  plan.tile_count = Value::dense({1}, DType::int32);
  set(plan.tile_count, 0, count);
  return plan;
}

}  // namespace

std::string make_spans(Input& input, int64_t q_len, int64_t k_len) {
  Program program;
  if (input.once_in(32)) add_layout(input, program, 1, q_len, k_len);
  add_spans(input, program, q_len, k_len, input.once_in(32));
  return program.text;
}

Plan make_plan(Input& input, int64_t batch, int64_t q_len, int64_t k_len, bool arbitrary) {
  if (!arbitrary) {
    const int64_t plan_batch = input.once_in(2) ? 1 : batch;
    std::vector<Value> results;
    if (plan_of(input, make_program(input, plan_batch, q_len, k_len), plan_batch, q_len, k_len, results)) {
      return {results[0], results[1], results[2], results[3], results[4], results[5], results[7]};
    }
  }
  return arbitrary_plan(input, batch, q_len, k_len);
}

void corrupt(Input& input, Plan& plan, int64_t q_len, int64_t k_len) {
  for (int64_t times = input.below(6); times > 0; times--) {
    Value* values[] = {&plan.start, &plan.end, &plan.tiles, &plan.tiles, &plan.key_valid, &plan.tile_count};
    Value& value = *values[input.below(6)];
    if (value.elements > 0 && holds_integers(value))
      set(value, input.below(value.elements), input.hostile(input.once_in(2) ? q_len : k_len));
  }
  for (Value* value : {&plan.start, &plan.end, &plan.key_valid, &plan.tiles, &plan.tile_count, &plan.positions}) {
    *value = input.misshapen(*value);
  }
}

void fuzz_plan(Input& input) {
  const int64_t batch = input.of({1, 1, 2, 3, 0}), q_len = input.length(300);
  const int64_t k_len = input.once_in(3) ? input.length(300) : q_len;
  const Program program = make_program(input, batch, q_len, k_len);
  const auto size = [&](int64_t honest) { return input.once_in(32) ? input.hostile(honest) : honest; };
  const int64_t said_batch = size(batch), said_q = size(q_len), said_k = size(k_len);
  std::vector<Value> results;
  if (plan_of(input, program, said_batch, said_q, said_k, results)) check_plan(results, said_batch, said_q, said_k);
}

}  // namespace fuzz
