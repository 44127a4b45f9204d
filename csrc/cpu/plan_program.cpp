// The checks of the operands of build_plan against its program.
#include <unordered_set>

#include "../plan_program.h"
#include "plan.h"

namespace maskops {
namespace {

using Kind = PlanLayout::Kind;
using Op = PlanStep::Op;
using plan_text::refuse;
using plan_text::require;
using plan_text::text_of;

// ---- value checks, in the words of layouts.py and lowering.py ----

void check_lengths(const char* name, const PlanOperand& operand, int64_t k_len) {
  const int64_t count = count_of(operand);
  for (int64_t i = 0; i < count; i++) {
    const int64_t value = element(operand, i);
    if (value >= 0 && value <= k_len) continue;
    const std::string fault = value < 0 ? "is negative" : "is more than k_len=" + text_of(k_len);
    refuse(std::string(name) + "[" + text_of(i) + "]=" + text_of(value) + " " + fault);
  }
}

void check_mask(const char* name, const PlanOperand& operand) {
  if (operand.type == IntegerType::boolean) return;
  const int64_t count = count_of(operand), width = operand.sizes[1];
  const int64_t bad = with_elements(operand, [&](auto data) {
    int64_t i = 0;
    while (i < count && (data[i] == 0 || data[i] == 1)) i++;
    return i;
  });
  if (bad == count) return;
  refuse(std::string(name) + "[" + text_of(bad / width) + ", " + text_of(bad % width) +
         "]=" + text_of(element(operand, bad)) + ": a mask holds 0 and 1; for document ids use masks.documents(ids)");
}

void check_cu_seqlens(const std::string& owner, const std::string& name, const PlanOperand& operand,
                      const char* const (&total_name)[2], int64_t total) {
  const int64_t last = count_of(operand) - 1;
  const std::string prefix = owner + name;
  if (element(operand, 0) != 0) refuse(prefix + "[0]=" + text_of(element(operand, 0)) + ": must be 0");
  for (int64_t i = 0; i < last; i++) {
    const int64_t before = element(operand, i), after = element(operand, i + 1);
    if (after < before) {
      refuse(prefix + "[" + text_of(i + 1) + "]=" + text_of(after) + " < " + name + "[" + text_of(i) +
             "]=" + text_of(before) + ": cumulative lengths never decrease");
    }
  }
  const int64_t end = element(operand, last);
  if (end > total) {
    refuse(prefix + "[-1]=" + text_of(end) + " is more than " + total_name[0] + text_of(total) + total_name[1]);
  }
}

// How many sequences the rows of ids hold.
int64_t check_ids(const PlanOperand& operand) {
  const int64_t width = operand.sizes[operand.dim - 1];
  const int64_t rows = operand.dim == 1 ? 1 : operand.sizes[0];
  const auto name = [&](int64_t row, int64_t column) {
    return "ids[" + (operand.dim == 1 ? "" : text_of(row) + ", ") + text_of(column) + "]";
  };
  return with_elements(operand, [&](auto data) {
    int64_t sequences = 0;
    std::vector<int64_t> finished;
    for (int64_t row = 0; row < rows; row++) {
      const auto* ids = data + row * width;
      finished.clear();
      std::unordered_set<int64_t> lookup;  // filled only where ids do not simply increase
      int64_t largest = -1;
      for (int64_t column = 0; column < width; column++) {
        const int64_t id = ids[column];
        if (column > 0 && id == static_cast<int64_t>(ids[column - 1])) continue;
        if (id < -1) {
          refuse("documents: " + name(row, column) + "=" + text_of(id) + " is negative (only -1 marks padding)");
        }
        if (id < 0) continue;
        if (id > largest) {
          largest = id;
        } else {
          if (lookup.empty()) lookup.insert(finished.begin(), finished.end());
          if (lookup.count(id) != 0) {
            refuse("documents: " + name(row, column) + "=" + text_of(id) + " returns after " + name(row, column - 1) +
                   "=" + text_of(ids[column - 1]) + ": the rows of a document must be contiguous");
          }
        }
        finished.push_back(id);
        if (!lookup.empty()) lookup.insert(id);
      }
      sequences += static_cast<int64_t>(finished.size());
    }
    return sequences;
  });
}

}  // namespace

void check_plan(const PlanRequest& request) {
  const int64_t batch = request.batch, q_len = request.q_len, k_len = request.k_len;
  require(
      batch >= 0 && q_len >= 0 && k_len >= 0 && batch < plan_longest && q_len < plan_longest && k_len < plan_longest,
      "a length is negative or too large");
  const auto operand = [&](int index) -> const PlanOperand& { return request.operands[index]; };
  const auto fits_batch = [&](int64_t size) { return size == 1 || size == batch; };
  const auto& layouts = request.program.layouts;
  int64_t n_sequences = -1;
  bool ids_decide = true;
  for (const PlanLayout& layout : layouts) {
    switch (layout.kind) {
      case Kind::padding_right:
      case Kind::padding_left:
      case Kind::key_lengths: {
        const PlanOperand& lengths = operand(layout.operand);
        require(lengths.dim == 1 && fits_batch(lengths.sizes[0]), "lengths must have shape (batch|1)");
        require(layout.kind == Kind::key_lengths || q_len == k_len, "padding needs q_len == k_len");
        check_lengths(layout.kind == Kind::key_lengths ? "key_padding: lengths" : "padding: lengths", lengths, k_len);
        break;
      }
      case Kind::key_length:
        require(0 <= layout.length && layout.length <= k_len, "the length of the keys is not in [0, k_len]");
        break;
      case Kind::padding_mask:
      case Kind::key_mask: {
        const PlanOperand& mask = operand(layout.operand);
        require(mask.dim == 2 && fits_batch(mask.sizes[0]) && mask.sizes[1] == k_len, "mask must be (batch|1, k_len)");
        require(layout.kind == Kind::key_mask || q_len == k_len, "padding needs q_len == k_len");
        check_mask(layout.kind == Kind::key_mask ? "key_padding: mask" : "padding: mask", mask);
        break;
      }
      case Kind::cu_seqlens: {
        const PlanOperand& queries = operand(layout.operand);
        const PlanOperand& keys = operand(layout.key_operand);
        require(batch == 1 && queries.dim == 1 && keys.dim == 1 && queries.sizes[0] >= 1 &&
                    queries.sizes[0] == keys.sizes[0],
                "cu_seqlens must be one packed row");
        const CuSeqlensNames& names = *layout.names;
        check_cu_seqlens(names.owner, names.queries, queries, names.q_total, q_len);
        if (layout.keys_given) check_cu_seqlens(names.owner, names.keys, keys, names.k_total, k_len);
        require(layout.keys_given || (q_len == k_len && layout.key_operand == layout.operand),
                "cu_seqlens without cu_seqlens_k needs q_len == k_len");
        if (n_sequences < 0) ids_decide = false;
        break;
      }
      case Kind::ids: {
        const PlanOperand& ids = operand(layout.operand);
        require((ids.dim == 1 || (ids.dim == 2 && fits_batch(ids.sizes[0]))) && ids.sizes[ids.dim - 1] == q_len &&
                    q_len == k_len,
                "ids must be (q_len) or (batch|1, q_len) with q_len == k_len");
        const int64_t rows = ids.dim == 1 ? 1 : ids.sizes[0];
        const int64_t found = check_ids(ids) * (rows == 1 ? batch : 1);
        if (n_sequences < 0) n_sequences = found;
        break;
      }
    }
  }
  for (int index = 0; index < plan_operands; index++) {
    const bool used =
        std::any_of(request.program.steps.begin(), request.program.steps.end(),
                    [&](const PlanStep& step) { return step.op == Op::prefix_of && step.value == index; });
    if (!used) continue;
    const PlanOperand& lengths = operand(index);
    const int64_t count = count_of(lengths);
    require(lengths.dim <= 1, "lengths of a prefix must have at most one dimension");
    for (int64_t i = 0; i < count; i++) {
      if (element(lengths, i) < 0) {
        refuse("prefix: lengths[" + text_of(i) + "]=" + text_of(element(lengths, i)) + " is negative");
      }
    }
    if (ids_decide && count != 1 && count < n_sequences) {
      refuse("prefix: lengths has " + text_of(count) + " elements, documents(ids) holds " + text_of(n_sequences) +
             " sequences");
    }
  }
}

}  // namespace maskops
