// build_plan on the CPU: near linear in rows and keys, one pass after the other over int32 arrays. The meaning is the
// torch path in maskops/masks.py and maskops/spans.py; both give the same integers.
#include "../plan.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string_view>
#include <unordered_set>
#include <utility>

namespace maskops {
namespace {

using Kind = PlanLayout::Kind;
using Op = PlanStep::Op;

constexpr int64_t block_rows = 512;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void require(bool condition, const char* message) {
  if (!condition) refuse(std::string("build_plan: ") + message);
}

std::string text_of(int64_t value) { return std::to_string(value); }

// ---- operands ----

int64_t count_of(const PlanOperand& operand) {
  int64_t count = 1;
  for (int64_t d = 0; d < operand.dim; d++) count *= operand.sizes[d];
  return count;
}

// Calls use(pointer to the elements) with the pointer's own type.
template <class Use>
auto with_elements(const PlanOperand& operand, Use use) {
  switch (operand.type) {
    case IntegerType::int32: return use(static_cast<const int32_t*>(operand.data));
    case IntegerType::int64: return use(static_cast<const int64_t*>(operand.data));
    default: return use(static_cast<const uint8_t*>(operand.data));
  }
}

int64_t element(const PlanOperand& operand, int64_t index) {
  return with_elements(operand, [&](auto data) { return static_cast<int64_t>(data[index]); });
}

// ---- program ----

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

bool parse_layout(std::string_view word, Words& words, PlanLayout& layout) {
  constexpr std::pair<std::string_view, Kind> names[] = {
      {"padding_right", Kind::padding_right}, {"padding_left", Kind::padding_left},
      {"padding_mask", Kind::padding_mask},   {"key_lengths", Kind::key_lengths},
      {"key_length", Kind::key_length},       {"key_mask", Kind::key_mask},
      {"cu_seqlens", Kind::cu_seqlens},       {"ids", Kind::ids},
  };
  for (const auto& [name, kind] : names) {
    if (word != name) continue;
    layout.kind = kind;
    if (kind == Kind::key_length) {
      layout.length = words.number();
    } else {
      layout.operand = words.operand();
    }
    if (kind == Kind::cu_seqlens) {
      layout.key_operand = words.operand();
      layout.keys_given = words.number() != 0;
    }
    return true;
  }
  return false;
}

PlanStep parse_step(std::string_view word, Words& words) {
  constexpr std::pair<std::string_view, Op> names[] = {
      {"first", Op::first},         {"last", Op::last},           {"diag", Op::diag},
      {"prefix", Op::prefix},       {"prefix_of", Op::prefix_of}, {"chunk_start", Op::chunk_start},
      {"chunk_end", Op::chunk_end}, {"max", Op::maximum},         {"min", Op::minimum},
  };
  for (const auto& [name, op] : names) {
    if (word != name) continue;
    if (op == Op::prefix_of) return {op, words.operand()};
    const bool has_value = op == Op::diag || op == Op::prefix || op == Op::chunk_start || op == Op::chunk_end;
    const int64_t value = has_value ? words.number() : 0;
    require(value >= 1 || (op != Op::chunk_start && op != Op::chunk_end), "a chunk has no keys");
    return {op, value};
  }
  refuse("build_plan: the program has an unknown word '" + std::string(word) + "'");
}

// ---- value checks, in the words of masks.py ----

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

void check_cu_seqlens(const std::string& name, const PlanOperand& operand, const char* total_name, int64_t total) {
  const int64_t last = count_of(operand) - 1;
  const std::string prefix = "documents: " + name;
  if (element(operand, 0) != 0) refuse(prefix + "[0]=" + text_of(element(operand, 0)) + ": must be 0");
  for (int64_t i = 0; i < last; i++) {
    const int64_t before = element(operand, i), after = element(operand, i + 1);
    if (after < before) {
      refuse(prefix + "[" + text_of(i + 1) + "]=" + text_of(after) + " < " + name + "[" + text_of(i) +
             "]=" + text_of(before) + ": cumulative lengths never decrease");
    }
  }
  const int64_t end = element(operand, last);
  if (end > total) refuse(prefix + "[-1]=" + text_of(end) + " is more than " + total_name + "=" + text_of(total));
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
  require(batch >= 0 && q_len >= 0 && k_len >= 0 && q_len < plan_longest && k_len < plan_longest,
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
        check_cu_seqlens("cu_seqlens", queries, "q_len", q_len);
        if (layout.keys_given) check_cu_seqlens("cu_seqlens_k", keys, "k_len", k_len);
        require(layout.keys_given || q_len == k_len, "cu_seqlens without cu_seqlens_k needs q_len == k_len");
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

namespace {

// ---- layouts ----

// Query rows [q_start, q_end) of one sequence and its keys. Rows in no run lie outside every sequence.
struct Run {
  int32_t q_start, q_end, k_start, k_end, ordinal;
};

// The 1s of a row of a mask: where they begin and end, and the row itself for the holes between.
struct Hull {
  int32_t first = 0, last = 0;
};

Hull hull_of(const PlanOperand& mask, int64_t row) {
  const int64_t width = mask.sizes[1];
  return with_elements(mask, [&](auto data) {
    const auto* bits = data + row * width;
    int64_t first = 0, last = width;
    while (first < width && bits[first] == 0) first++;
    while (last > first && bits[last - 1] == 0) last--;
    return last > first ? Hull{static_cast<int32_t>(first), static_cast<int32_t>(last)} : Hull{};
  });
}

class Layouts {
 public:
  explicit Layouts(const PlanRequest& request) : request_(request), ids_counted_(request.program.layouts.size(), 0) {}

  // Batch elements in order: ordinals of ids count from one to the next.
  void next(int64_t b) {
    const int32_t q_len = static_cast<int32_t>(request_.q_len), k_len = static_cast<int32_t>(request_.k_len);
    runs_.assign(1, Run{0, q_len, 0, k_len, static_cast<int32_t>(b)});
    row_holes_.clear();
    key_holes_.clear();
    bool counted = false;
    for (size_t index = 0; index < request_.program.layouts.size(); index++) {
      const PlanLayout& layout = request_.program.layouts[index];
      describe(layout, b, ids_counted_[index]);
      const bool counts = !counted && (layout.kind == Kind::ids || layout.kind == Kind::cu_seqlens);
      counted = counted || counts;
      intersect(counts);
    }
  }

  const std::vector<Run>& runs() const { return runs_; }
  bool has_key_holes() const { return !key_holes_.empty(); }

  // Calls use(bits) for every mask that may have holes, with the bits of this batch element.
  template <class Use>
  void for_row_holes(Use use) const {
    for (const auto& [mask, row] : row_holes_) {
      with_elements(*mask, [&, at = row * mask->sizes[1]](auto data) { use(data + at); });
    }
  }
  template <class Use>
  void for_key_holes(Use use) const {
    for (const auto& [mask, row] : key_holes_) {
      with_elements(*mask, [&, at = row * mask->sizes[1]](auto data) { use(data + at); });
    }
  }

 private:
  // The runs of one layout, into found_.
  void describe(const PlanLayout& layout, int64_t b, int32_t& counted) {
    const int32_t q_len = static_cast<int32_t>(request_.q_len), k_len = static_cast<int32_t>(request_.k_len);
    found_.clear();
    if (layout.kind == Kind::key_length) {
      found_.push_back({0, q_len, 0, static_cast<int32_t>(layout.length), 0});
      return;
    }
    const PlanOperand& operand = request_.operands[layout.operand];
    const int64_t row = operand.dim == 0 || operand.sizes[0] == 1 ? 0 : b;
    switch (layout.kind) {
      case Kind::padding_right:
      case Kind::padding_left:
      case Kind::key_lengths: {
        const int32_t length = static_cast<int32_t>(element(operand, row));
        if (layout.kind == Kind::key_lengths) found_.push_back({0, q_len, 0, length, 0});
        if (layout.kind == Kind::padding_right) found_.push_back({0, length, 0, length, 0});
        if (layout.kind == Kind::padding_left) found_.push_back({k_len - length, q_len, k_len - length, k_len, 0});
        break;
      }
      case Kind::padding_mask:
      case Kind::key_mask: {
        const Hull hull = hull_of(operand, row);
        const bool rows_too = layout.kind == Kind::padding_mask;
        found_.push_back({rows_too ? hull.first : 0, rows_too ? hull.last : q_len, hull.first, hull.last, 0});
        key_holes_.push_back({&operand, row});
        if (rows_too) row_holes_.push_back({&operand, row});
        break;
      }
      case Kind::cu_seqlens: {
        const PlanOperand& keys = request_.operands[layout.key_operand];
        for (int64_t i = 0; i + 1 < operand.sizes[0]; i++) {
          const int32_t q_start = static_cast<int32_t>(element(operand, i));
          const int32_t q_end = static_cast<int32_t>(element(operand, i + 1));
          if (q_end == q_start) continue;
          found_.push_back({q_start, q_end, static_cast<int32_t>(element(keys, i)),
                            static_cast<int32_t>(element(keys, i + 1)), static_cast<int32_t>(i)});
        }
        break;
      }
      case Kind::ids:
        with_elements(operand, [&, at = operand.dim == 1 ? 0 : row * q_len](auto data) {
          const auto* ids = data + at;
          for (int32_t begin = 0, stop; begin < q_len; begin = stop) {
            const auto id = ids[begin];
            stop = begin + 1;
            while (stop < q_len && ids[stop] == id) stop++;
            if (static_cast<int64_t>(id) >= 0) found_.push_back({begin, stop, begin, stop, counted++});
          }
        });
        break;
      case Kind::key_length: break;
    }
  }

  // runs_ = rows in both runs_ and found_, with the intersection of their keys. Both are in the order of the rows.
  void intersect(bool take_ordinals) {
    both_.clear();
    for (size_t a = 0, b = 0; a < runs_.size() && b < found_.size();) {
      const Run &x = runs_[a], &y = found_[b];
      Run run{std::max(x.q_start, y.q_start), std::min(x.q_end, y.q_end), std::max(x.k_start, y.k_start),
              std::min(x.k_end, y.k_end), take_ordinals ? y.ordinal : x.ordinal};
      run.k_end = std::max(run.k_end, run.k_start);
      if (run.q_end > run.q_start) both_.push_back(run);
      if (x.q_end < y.q_end) {
        a++;
      } else {
        b++;
      }
    }
    runs_.swap(both_);
  }

  const PlanRequest& request_;
  std::vector<int32_t> ids_counted_;
  std::vector<Run> runs_, found_, both_;
  std::vector<std::pair<const PlanOperand*, int64_t>> row_holes_, key_holes_;
};

// ---- spans ----

// Evaluates the bounds of all spans over blocks of rows.
class Evaluator {
 public:
  explicit Evaluator(const PlanRequest& request)
      : request_(request),
        farthest_(static_cast<int32_t>(request.q_len + request.k_len + 1)),
        depth_(2 * static_cast<size_t>(request.program.n_spans()) + request.program.deepest),
        values_(depth_ * block_rows) {}

  // The rows [first, first + count) of batch element b, whose spans go to result.
  void block(int64_t b, int64_t first, int64_t count, const Layouts& layouts, size_t& run, const PlanResult& result) {
    fill(first, count, layouts.runs(), run);
    const int64_t n_spans = request_.program.n_spans();
    const int64_t plane = request_.batch * request_.q_len;
    const int64_t at = b * request_.q_len + first;
    size_t step = 0;
    for (int64_t span = 0; span < n_spans; span++) {
      int32_t* top = value(2 * static_cast<size_t>(span));
      for (; step < request_.program.span_ends[static_cast<size_t>(span)]; step++) {
        top = evaluate(request_.program.steps[step], top, count);
      }
      int32_t* const start = value(2 * static_cast<size_t>(span));
      int32_t* const end = start + block_rows;
      for (int64_t i = 0; i < count; i++) {
        const int32_t low = std::min(std::max(start[i], k_start_[i]), k_end_[i]);
        end[i] = std::min(std::max(end[i], low), k_end_[i]);
        start[i] = low;
      }
      layouts.for_row_holes([&](auto bits) {
        for (int64_t i = 0; i < count; i++) {
          const int32_t keep = bits[first + i] != 0 ? -1 : 0;
          start[i] &= keep;
          end[i] &= keep;
        }
      });
    }
    if (n_spans > 1) make_disjoint(n_spans, count);
    for (int64_t span = 0; span < n_spans; span++) {
      const int32_t* start = value(2 * static_cast<size_t>(span));
      std::memcpy(result.start + span * plane + at, start, static_cast<size_t>(count) * sizeof(int32_t));
      std::memcpy(result.end + span * plane + at, start + block_rows, static_cast<size_t>(count) * sizeof(int32_t));
    }
    if (result.positions == nullptr) return;
    const int32_t* sources[] = {diag_, k_start_, ordinal_};
    for (int field = 0; field < 3; field++) {
      std::memcpy(result.positions + field * plane + at, sources[field], static_cast<size_t>(count) * sizeof(int32_t));
    }
  }

 private:
  int32_t* value(size_t index) { return values_.data() + index * block_rows; }

  // The sequence of each row; rows outside every sequence get no keys.
  void fill(int64_t first, int64_t count, const std::vector<Run>& runs, size_t& run) {
    for (int64_t i = 0; i < count;) {
      const int64_t row = first + i;
      while (run < runs.size() && runs[run].q_end <= row) run++;
      Run current{0, INT32_MAX, 0, 0, -1};
      if (run < runs.size() && runs[run].q_start <= row) {
        current = runs[run];
      } else if (run < runs.size()) {
        current.q_end = runs[run].q_start;
      }
      const int64_t stop = std::min<int64_t>(count, current.q_end - first);
      const int32_t base = current.ordinal < 0 ? 0 : current.k_end - current.q_end + static_cast<int32_t>(first);
      const int32_t slope = current.ordinal < 0 ? 0 : 1;
      for (; i < stop; i++) {
        k_start_[i] = current.k_start;
        k_end_[i] = current.k_end;
        diag_[i] = base + slope * static_cast<int32_t>(i);
        ordinal_[i] = current.ordinal;
      }
    }
  }

  // One step of a program whose free value is top; returns the next free one.
  int32_t* evaluate(const PlanStep& step, int32_t* top, int64_t count) {
    const int32_t offset = static_cast<int32_t>(std::clamp<int64_t>(step.value, -farthest_, farthest_));
    switch (step.op) {
      case Op::first: std::memcpy(top, k_start_, static_cast<size_t>(count) * sizeof(int32_t)); break;
      case Op::last: std::memcpy(top, k_end_, static_cast<size_t>(count) * sizeof(int32_t)); break;
      case Op::diag:
        for (int64_t i = 0; i < count; i++) top[i] = diag_[i] + offset;
        break;
      case Op::prefix:
        for (int64_t i = 0; i < count; i++) top[i] = k_start_[i] + offset;
        break;
      case Op::prefix_of: add_prefix_lengths(request_.operands[step.value], top, count); break;
      case Op::chunk_start:
      case Op::chunk_end:
        for (int64_t i = 0; i < count; i++) {
          const int32_t position = diag_[i] - k_start_[i];
          const int32_t chunk = position / offset - (position % offset < 0);
          top[i] = k_start_[i] + (step.op == Op::chunk_start ? chunk : chunk + 1) * offset;
        }
        break;
      case Op::maximum:
      case Op::minimum: {
        int32_t* const left = top - 2 * block_rows;
        const int32_t* const right = top - block_rows;
        if (step.op == Op::maximum) {
          for (int64_t i = 0; i < count; i++) left[i] = std::max(left[i], right[i]);
        } else {
          for (int64_t i = 0; i < count; i++) left[i] = std::min(left[i], right[i]);
        }
        return top - block_rows;
      }
    }
    return top + block_rows;
  }

  void add_prefix_lengths(const PlanOperand& lengths, int32_t* top, int64_t count) {
    const int64_t last = count_of(lengths) - 1;
    if (last < 0) {
      std::memcpy(top, k_start_, static_cast<size_t>(count) * sizeof(int32_t));
      return;
    }
    with_elements(lengths, [&](auto data) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t length = static_cast<int64_t>(data[std::clamp<int64_t>(ordinal_[i], 0, last)]);
        top[i] = k_start_[i] + static_cast<int32_t>(std::min<int64_t>(length, farthest_));
      }
    });
  }

  // Sorts the spans of each row by (start, end) and clips each to begin at the end of those before it.
  void make_disjoint(int64_t n_spans, int64_t count) {
    for (int64_t round = n_spans - 1; round > 0; round--) {
      for (int64_t span = 0; span < round; span++) {
        int32_t* const start_a = value(2 * static_cast<size_t>(span));
        int32_t* const end_a = start_a + block_rows;
        int32_t* const start_b = end_a + block_rows;
        int32_t* const end_b = start_b + block_rows;
        for (int64_t i = 0; i < count; i++) {
          const int32_t sa = start_a[i], sb = start_b[i], ea = end_a[i], eb = end_b[i];
          const int32_t swap = -static_cast<int32_t>((sb < sa) | ((sb == sa) & (eb < ea)));
          const int32_t start_change = (sa ^ sb) & swap, end_change = (ea ^ eb) & swap;
          start_a[i] = sa ^ start_change;
          start_b[i] = sb ^ start_change;
          end_a[i] = ea ^ end_change;
          end_b[i] = eb ^ end_change;
        }
      }
    }
    for (int64_t span = 1; span < n_spans; span++) {
      int32_t* const start = value(2 * static_cast<size_t>(span));
      int32_t* const end = start + block_rows;
      const int32_t* const before = start - block_rows;
      for (int64_t i = 0; i < count; i++) {
        start[i] = std::max(start[i], before[i]);
        end[i] = std::max(end[i], start[i]);
      }
    }
  }

  const PlanRequest& request_;
  const int32_t farthest_;  // beyond every key from every row: larger offsets mean the same
  const size_t depth_;
  std::vector<int32_t> values_;
  int32_t k_start_[block_rows], k_end_[block_rows], diag_[block_rows], ordinal_[block_rows];
};

// ---- query tiles ----

struct Segment {
  int64_t begin, end;
  int32_t low, high;  // hull of the keys; low > high where no row sees any
};

struct Item {
  int64_t first, rows;
};

class WorkList {
 public:
  WorkList(const PlanRequest& request, const PlanResult& result)
      : q_len_(request.q_len),
        k_len_(request.k_len),
        n_spans_(request.program.n_spans()),
        plane_(request.batch * request.q_len),
        width_(4 + 4 * n_spans_),
        per_batch_(tiles_per_batch_element(q_len_, k_len_)),
        capacity_(request.batch * per_batch_),
        result_(result) {
    if (n_spans_ > 1) {
      first_.resize(static_cast<size_t>(q_len_));
      last_.resize(static_cast<size_t>(q_len_));
    }
  }

  // Appends the items of batch element b and writes its key_valid; has_holes where `layouts` excludes keys.
  void add(int64_t b, const Layouts& layouts) {
    const int32_t* start = result_.start + b * q_len_;
    const int32_t* end = result_.end + b * q_len_;
    const int32_t *first = start, *last = end;
    if (n_spans_ > 1) {
      find_hulls(start, end);
      first = first_.data();
      last = last_.data();
    }
    find_segments(first, last, segments_);
    write_key_valid(b, start, end, layouts);
    choose_items();
    for (const Item& item : items_) write(b, item, start, end, first, last);
  }

  void finish() {
    const int64_t unused = capacity_ - used_;
    std::memset(result_.tiles + used_ * width_, 0, static_cast<size_t>(unused * width_) * sizeof(int32_t));
    *result_.tile_count = static_cast<int32_t>(used_);
  }

 private:
  void find_hulls(const int32_t* start, const int32_t* end) {
    std::fill(first_.begin(), first_.end(), INT32_MAX);
    std::fill(last_.begin(), last_.end(), 0);
    int32_t *const first = first_.data(), *const last = last_.data();
    for (int64_t span = 0; span < n_spans_; span++, start += plane_, end += plane_) {
      for (int64_t i = 0; i < q_len_; i++) {
        const int32_t dead = end[i] > start[i] ? 0 : INT32_MAX;
        first[i] = std::min(first[i], start[i] | dead);
        last[i] = std::max(last[i], end[i] & ~dead);
      }
    }
  }

  // Runs of rows whose intervals overlap from one non-empty row to the next; their union is their hull.
  void find_segments(const int32_t* first, const int32_t* last, std::vector<Segment>& segments) const {
    segments.clear();
    Segment segment{0, 0, INT32_MAX, 0};
    int32_t before_first = 0, before_last = INT32_MAX;  // overlaps everything: the first hull begins no segment
    int64_t before = -1;                                // the last row that sees a key
    constexpr int64_t chunk = 64;
    for (int64_t i = 0; i < q_len_;) {
      if (before >= 0 && before == i - 1 && i + chunk <= q_len_) {
        // Most rows overlap the row before them; a chunk where all do needs no decisions.
        int32_t breaks = 0, low = INT32_MAX, high = 0;
        for (int64_t j = i; j < i + chunk; j++) {
          breaks |= (last[j] <= first[j]) | (first[j] >= last[j - 1]) | (first[j - 1] >= last[j]);
          low = std::min(low, first[j]);
          high = std::max(high, last[j]);
        }
        if (breaks == 0) {
          segment.low = std::min(segment.low, low);
          segment.high = std::max(segment.high, high);
          i += chunk;
          before = i - 1;
          before_first = first[before];
          before_last = last[before];
          continue;
        }
      }
      for (const int64_t stop = std::min(i + chunk, q_len_); i < stop; i++) {
        const int32_t from = first[i], to = last[i];
        if (to <= from) continue;
        if (from >= before_last || before_first >= to) {
          segment.end = i;
          segments.push_back(segment);
          segment = {i, 0, from, to};
        }
        segment.low = std::min(segment.low, from);
        segment.high = std::max(segment.high, to);
        before_first = from;
        before_last = to;
        before = i;
      }
    }
    segment.end = q_len_;
    if (q_len_ > 0) segments.push_back(segment);
  }

  // The greedy of spans.py: long segments alone, short ones together while rows and keys permit.
  void choose_items() {
    items_.clear();
    for (size_t at = 0; at < segments_.size();) {
      const Segment& head = segments_[at++];
      if (head.end - head.begin >= tile_rows) {
        for (int64_t row = head.begin; row < head.end; row += tile_rows) {
          items_.push_back({row, std::min(tile_rows, head.end - row)});
        }
        continue;
      }
      int64_t low = head.low, high = head.high, stop = head.end;
      for (; at < segments_.size(); at++) {
        const Segment& next = segments_[at];
        const int64_t new_low = std::min<int64_t>(low, next.low), new_high = std::max<int64_t>(high, next.high);
        const bool is_long = next.end - next.begin >= tile_rows;
        if (is_long || next.end - head.begin > tile_rows || new_high - new_low > 2 * tile_rows) break;
        low = new_low;
        high = new_high;
        stop = next.end;
      }
      items_.push_back({head.begin, stop - head.begin});
    }
    if (static_cast<int64_t>(items_.size()) <= per_batch_) return;
    items_.clear();
    for (int64_t row = 0; row < q_len_; row += tile_rows) items_.push_back({row, std::min(tile_rows, q_len_ - row)});
  }

  void write_key_valid(int64_t b, const int32_t* start, const int32_t* end, const Layouts& layouts) {
    uint8_t* const valid = result_.key_valid + b * k_len_;
    if (n_spans_ == 1) {
      std::memset(valid, 0, static_cast<size_t>(k_len_));
      for (const Segment& segment : segments_) {
        if (segment.high > segment.low) {
          std::memset(valid + segment.low, 1, static_cast<size_t>(segment.high - segment.low));
        }
      }
    } else {
      write_union(start, end, valid);
    }
    valid_before_.clear();
    if (!layouts.has_key_holes()) return;
    layouts.for_key_holes([&](auto bits) {
      for (int64_t j = 0; j < k_len_; j++) valid[j] &= bits[j] != 0;
    });
    valid_before_.resize(static_cast<size_t>(k_len_) + 1);
    valid_before_[0] = 0;
    for (int64_t j = 0; j < k_len_; j++) {
      valid_before_[static_cast<size_t>(j) + 1] = valid_before_[static_cast<size_t>(j)] + valid[j];
    }
  }

  // valid[j] = whether some span of some row covers key j.
  void write_union(const int32_t* start, const int32_t* end, uint8_t* valid) {
    steps_.assign(static_cast<size_t>(k_len_) + 1, 0);
    for (int64_t span = 0; span < n_spans_; span++) {
      find_segments(start + span * plane_, end + span * plane_, covered_);
      for (const Segment& segment : covered_) {
        if (segment.high <= segment.low) continue;
        steps_[static_cast<size_t>(segment.low)]++;
        steps_[static_cast<size_t>(segment.high)]--;
      }
    }
    int32_t depth = 0;
    for (int64_t j = 0; j < k_len_; j++) {
      depth += steps_[static_cast<size_t>(j)];
      valid[j] = depth > 0;
    }
  }

  void write(int64_t b, const Item& item, const int32_t* start, const int32_t* end, const int32_t* first,
             const int32_t* last) {
    int32_t* out = result_.tiles + used_++ * width_;
    out[0] = static_cast<int32_t>(b);
    out[1] = static_cast<int32_t>(item.first);
    out[2] = static_cast<int32_t>(item.rows);
    int64_t cost = 0;
    for (int64_t span = 0; span < n_spans_; span++) {
      const int32_t* const from = start + span * plane_ + item.first;
      const int32_t* const to = end + span * plane_ + item.first;
      int32_t low = INT32_MAX, full_low = 0, full_high = INT32_MAX, high = 0, mixed = 0;
      int32_t cost_low = 0, cost_high = 0;  // at most 128 halves of 16 bits each, so that int32 lanes do
      for (int64_t i = 0; i < item.rows; i++) {
        const int32_t begin = from[i], stop = to[i];
        const int32_t dead = stop > begin ? 0 : INT32_MAX;  // as bits: or-ed it is the neutral element of a minimum
        low = std::min(low, begin | dead);
        full_low = std::max(full_low, begin & ~dead);
        full_high = std::min(full_high, stop | dead);
        high = std::max(high, stop & ~dead);
        cost_low += (stop - begin) & 0xffff;
        cost_high += (stop - begin) >> 16;
      }
      cost += cost_low + (static_cast<int64_t>(cost_high) << 16);
      if (n_spans_ > 1) {
        for (int64_t i = 0; i < item.rows; i++) {
          mixed |= (to[i] <= from[i]) & (last[item.first + i] > first[item.first + i]);
        }
      }
      bool partial = mixed != 0 || full_high <= full_low;
      if (!partial && !valid_before_.empty()) {
        partial = valid_before_[static_cast<size_t>(full_high)] - valid_before_[static_cast<size_t>(full_low)] !=
                  full_high - full_low;
      }
      int32_t* const bounds = out + 4 + 4 * span;
      bounds[0] = high > 0 ? low : 0;
      bounds[1] = high > 0 && !partial ? full_low : high;
      bounds[2] = high > 0 && !partial ? full_high : high;
      bounds[3] = high;
    }
    out[3] = static_cast<int32_t>(std::min<int64_t>(cost, INT32_MAX));
  }

  const int64_t q_len_, k_len_, n_spans_, plane_, width_, per_batch_, capacity_;
  const PlanResult& result_;
  int64_t used_ = 0;
  std::vector<int32_t> first_, last_;  // hulls of the rows, where there are several spans
  std::vector<int32_t> steps_;         // +1 where an interval of seen keys begins, -1 where it ends
  std::vector<int32_t> valid_before_;  // valid keys before each key; empty where there are no holes
  std::vector<Segment> segments_;      // of the hulls of the rows
  std::vector<Segment> covered_;       // of one span
  std::vector<Item> items_;
};

// ---- key tiles ----

// Consecutive rows that see the same key tiles (see_from to see_to, inclusive) and the same tiles as a whole.
struct RowRun {
  int32_t begin, end, see_from, see_to, full_from, full_stop;
};

// Assigns each tile of [from, to] that has no value yet the value of the first range that reaches it.
class FirstReach {
 public:
  void reset(int64_t n_tiles) {
    next_.resize(static_cast<size_t>(n_tiles) + 1);
    for (int64_t t = 0; t <= n_tiles; t++) next_[static_cast<size_t>(t)] = static_cast<int32_t>(t);
  }
  template <class Assign>
  void cover(int32_t from, int32_t to, Assign assign) {
    for (int32_t tile = find(from); tile <= to; tile = find(tile)) {
      assign(tile);
      next_[static_cast<size_t>(tile)] = tile + 1;
    }
  }

 private:
  int32_t find(int32_t tile) {
    int32_t root = tile;
    while (next_[static_cast<size_t>(root)] != root) root = next_[static_cast<size_t>(root)];
    while (next_[static_cast<size_t>(tile)] != root && tile != root) {
      tile = std::exchange(next_[static_cast<size_t>(tile)], root);
    }
    return root;
  }
  std::vector<int32_t> next_;  // the next tile without a value, through a chain of these
};

class KeyTiles {
 public:
  KeyTiles(const PlanRequest& request, const PlanResult& result)
      : batch_(request.batch),
        q_len_(request.q_len),
        k_len_(static_cast<int32_t>(request.k_len)),
        n_tiles_((request.k_len + key_tile - 1) / key_tile),
        result_(result) {}

  void add(int64_t span, int64_t b, bool has_holes) {
    const int64_t row = (span * batch_ + b) * q_len_;
    find_runs(result_.start + row, result_.end + row);
    int32_t* const out = result_.key_tiles + (span * batch_ + b) * n_tiles_ * 4;
    std::memset(out, 0, static_cast<size_t>(n_tiles_) * 4 * sizeof(int32_t));
    covering_.assign(static_cast<size_t>(n_tiles_) + 1, 0);
    see_.reset(n_tiles_);
    whole_.reset(n_tiles_);
    for (const RowRun& run : runs_) {
      see_.cover(run.see_from, run.see_to, [&](int32_t tile) { out[tile * 4] = run.begin; });
      if (run.full_stop <= run.full_from) continue;
      whole_.cover(run.full_from, run.full_stop - 1, [&](int32_t tile) { out[tile * 4 + 1] = run.begin; });
      covering_[static_cast<size_t>(run.full_from)] += run.end - run.begin;
      covering_[static_cast<size_t>(run.full_stop)] -= run.end - run.begin;
    }
    see_.reset(n_tiles_);
    whole_.reset(n_tiles_);
    for (size_t index = runs_.size(); index-- > 0;) {
      const RowRun& run = runs_[index];
      see_.cover(run.see_from, run.see_to, [&](int32_t tile) { out[tile * 4 + 3] = run.end; });
      if (run.full_stop <= run.full_from) continue;
      whole_.cover(run.full_from, run.full_stop - 1, [&](int32_t tile) { out[tile * 4 + 2] = run.end; });
    }
    int32_t covering = 0;
    for (int64_t tile = 0; tile < n_tiles_; tile++) {
      int32_t* const bounds = out + tile * 4;
      covering += covering_[static_cast<size_t>(tile)];
      bool accepted = covering > 0 && covering == bounds[2] - bounds[1];
      if (accepted && has_holes) {
        const uint8_t* const valid = result_.key_valid + b * k_len_;
        const int64_t stop = std::min<int64_t>(k_len_, (tile + 1) * key_tile);
        accepted = std::all_of(valid + tile * key_tile, valid + stop, [](uint8_t bit) { return bit != 0; });
      }
      if (!accepted) bounds[1] = bounds[2] = bounds[3];
    }
  }

 private:
  // Starts (or ends) that lie in the same tiles: a border between two tiles, or everything between two borders.
  struct Range {
    int32_t low, size;
    explicit Range(int32_t key) {
      constexpr int32_t tile = static_cast<int32_t>(key_tile);
      const int32_t inside = key % tile;
      low = inside == 0 ? key : key - inside + 1;
      size = inside == 0 ? 1 : tile - 1;
    }
    bool holds(int32_t key) const { return static_cast<uint32_t>(key - low) < static_cast<uint32_t>(size); }
  };

  void find_runs(const int32_t* start, const int32_t* end) {
    constexpr int32_t tile = static_cast<int32_t>(key_tile);
    runs_.clear();
    const int32_t rows = static_cast<int32_t>(q_len_);
    for (int32_t i = 0, stop; i < rows; i = stop) {
      stop = i + 1;
      if (end[i] <= start[i]) continue;
      const bool reaches_last = end[i] >= k_len_;  // then the ragged last tile is covered as a whole
      const Range starts(start[i]), ends(end[i]);
      while (stop < rows && starts.holds(start[stop]) && ends.holds(end[stop]) && end[stop] > start[stop] &&
             (end[stop] >= k_len_) == reaches_last) {
        stop++;
      }
      runs_.push_back({i, stop, start[i] / tile, (end[i] - 1) / tile, (start[i] + tile - 1) / tile,
                       reaches_last ? static_cast<int32_t>(n_tiles_) : end[i] / tile});
    }
  }

  const int64_t batch_, q_len_;
  const int32_t k_len_;
  const int64_t n_tiles_;
  const PlanResult& result_;
  FirstReach see_, whole_;
  std::vector<RowRun> runs_;
  std::vector<int32_t> covering_;  // +rows where a run begins to cover whole tiles, -rows where it stops
};

}  // namespace

PlanProgram parse_plan(const std::string& text) {
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
      const bool joins = step.op == Op::maximum || step.op == Op::minimum;
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

void build_plan(const PlanRequest& request, const PlanResult& result) {
  Layouts layouts(request);
  Evaluator evaluator(request);
  WorkList work_list(request, result);
  KeyTiles key_tiles(request, result);
  for (int64_t b = 0; b < request.batch; b++) {
    layouts.next(b);
    size_t run = 0;
    for (int64_t row = 0; row < request.q_len; row += block_rows) {
      evaluator.block(b, row, std::min(block_rows, request.q_len - row), layouts, run, result);
    }
    work_list.add(b, layouts);
    if (result.key_tiles == nullptr) continue;
    for (int64_t span = 0; span < request.program.n_spans(); span++) key_tiles.add(span, b, layouts.has_key_holes());
  }
  work_list.finish();
}

}  // namespace maskops
