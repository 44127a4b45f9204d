// The program of build_plan: its text to steps. In a header, for the CUDA kernels are also built without the rest.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "plan.h"

namespace maskops {
namespace plan_text {

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline void require(bool condition, const char* message) {
  if (!condition) refuse(std::string("build_plan: ") + message);
}

inline std::string text_of(int64_t value) { return std::to_string(value); }

// ---- text to program ----

struct Words {
  std::string_view rest;
  std::string_view next() {
    const size_t length = std::min(rest.find(' '), rest.size());
    const std::string_view word = rest.substr(0, length);
    rest.remove_prefix(std::min(length + 1, rest.size()));
    return word;
  }
  int64_t number() {
    const std::string_view word = next();
    const bool negative = !word.empty() && word[0] == '-';
    require(word.size() > static_cast<size_t>(negative) && word.size() < 20, "a number is missing in the program");
    int64_t value = 0;
    for (char digit : word.substr(negative)) {
      require(digit >= '0' && digit <= '9', "a number of the program is malformed");
      // Larger ones mean the same as this one: everything is clipped to the lengths.
      value = std::min<int64_t>(value * 10 + (digit - '0'), int64_t{1} << 40);
    }
    return negative ? -value : value;
  }
  int operand() {
    const int64_t index = number();
    require(0 <= index && index < plan_operands, "the program names an operand that does not exist");
    return static_cast<int>(index);
  }
};

inline constexpr CuSeqlensNames documents_names{
    "documents: ", "cu_seqlens", "cu_seqlens_k", {"q_len=", ""}, {"k_len=", ""}};
inline constexpr CuSeqlensNames varlen_names{
    "", "cu_seqlens_q", "cu_seqlens_k", {"the ", " rows of q"}, {"the ", " rows of k"}};

inline bool parse_layout(std::string_view word, Words& words, PlanLayout& layout) {
  constexpr std::pair<std::string_view, PlanLayout::Kind> names[] = {
      {"padding_right", PlanLayout::Kind::padding_right},
      {"padding_left", PlanLayout::Kind::padding_left},
      {"padding_mask", PlanLayout::Kind::padding_mask},
      {"key_lengths", PlanLayout::Kind::key_lengths},
      {"key_length", PlanLayout::Kind::key_length},
      {"key_mask", PlanLayout::Kind::key_mask},
      {"cu_seqlens", PlanLayout::Kind::cu_seqlens},
      {"varlen", PlanLayout::Kind::cu_seqlens},
      {"ids", PlanLayout::Kind::ids},
  };
  for (const auto& [name, kind] : names) {
    if (word != name) continue;
    layout.kind = kind;
    if (kind == PlanLayout::Kind::key_length) {
      layout.length = words.number();
    } else {
      layout.operand = words.operand();
    }
    if (kind == PlanLayout::Kind::cu_seqlens) {
      layout.key_operand = words.operand();
      layout.keys_given = words.number() != 0;
      layout.names = word == "varlen" ? &varlen_names : &documents_names;
    }
    return true;
  }
  return false;
}

inline PlanStep parse_step(std::string_view word, Words& words) {
  constexpr std::pair<std::string_view, PlanStep::Op> names[] = {
      {"first", PlanStep::Op::first},         {"last", PlanStep::Op::last},
      {"diag", PlanStep::Op::diag},           {"prefix", PlanStep::Op::prefix},
      {"prefix_of", PlanStep::Op::prefix_of}, {"chunk_start", PlanStep::Op::chunk_start},
      {"chunk_end", PlanStep::Op::chunk_end}, {"max", PlanStep::Op::maximum},
      {"min", PlanStep::Op::minimum},
  };
  for (const auto& [name, op] : names) {
    if (word != name) continue;
    if (op == PlanStep::Op::prefix_of) return {op, words.operand()};
    const bool has_value = op == PlanStep::Op::diag || op == PlanStep::Op::prefix || op == PlanStep::Op::chunk_start ||
                           op == PlanStep::Op::chunk_end;
    const int64_t value = has_value ? words.number() : 0;
    require(value >= 1 || (op != PlanStep::Op::chunk_start && op != PlanStep::Op::chunk_end), "a chunk has no keys");
    return {op, value};
  }
  refuse("build_plan: the program has an unknown word '" + std::string(word) + "'");
}

}  // namespace plan_text

inline PlanProgram parse_plan(const std::string& text) {
  using namespace plan_text;
  PlanProgram program;
  Words words{text};
  std::string_view word = words.next();
  for (PlanLayout layout; parse_layout(word, words, layout); word = words.next()) {
    program.layouts.push_back(layout);
    layout = {};
  }
  while (!word.empty()) {
    require(word == "span", "the program has an unknown layout");
    size_t depth = 0;
    for (word = words.next(); !word.empty() && word != "span"; word = words.next()) {
      const PlanStep step = parse_step(word, words);
      const bool joins = step.op == PlanStep::Op::maximum || step.op == PlanStep::Op::minimum;
      require(!joins || depth >= 2, "the program takes the maximum or minimum of nothing");
      depth = joins ? depth - 1 : depth + 1;
      program.deepest = std::max(program.deepest, depth);
      program.steps.push_back(step);
    }
    require(depth == 2, "a span of the program must leave its start and its end");
    program.span_ends.push_back(program.steps.size());
  }
  require(!program.span_ends.empty(), "the program has no span");
  return program;
}

}  // namespace maskops
