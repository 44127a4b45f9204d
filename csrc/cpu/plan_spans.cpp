// Layouts and bounds to spans: start, end and positions of every row.
#include "plan.h"

#include <algorithm>
#include <cstring>

namespace maskops {
namespace {

using Kind = PlanLayout::Kind;
using Op = PlanStep::Op;

constexpr int64_t block_rows = 512;

// ---- layouts ----

// Query rows [q_start, q_end) of one sequence and its keys. Rows in no run lie outside every sequence.
struct Run {
  int32_t q_start, q_end, k_start, k_end, ordinal;
};

// The 1s of a row of a mask: where they begin and end.
struct Hull {
  int32_t first = 0, last = 0;
};

Hull hull_of(const PlanOperand& mask, int64_t b) {
  int64_t first = 0, last = mask.sizes[1];
  with_mask_row(mask, b, [&](auto bits) {
    while (first < last && bits[first] == 0) first++;
    while (last > first && bits[last - 1] == 0) last--;
  });
  return last > first ? Hull{static_cast<int32_t>(first), static_cast<int32_t>(last)} : Hull{};
}

// The sequences of one batch element after the other: all layouts intersected, as runs of rows.
class Layouts {
 public:
  explicit Layouts(const PlanRequest& request) : request_(request), ids_counted_(request.program.layouts.size(), 0) {}

  // Batch elements in order: ordinals of ids count from one to the next.
  void next(int64_t b) {
    const int32_t q_len = static_cast<int32_t>(request_.q_len), k_len = static_cast<int32_t>(request_.k_len);
    runs_.assign(1, Run{0, q_len, 0, k_len, static_cast<int32_t>(b)});
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
    const int64_t row = row_of(operand, b);
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
        const Hull hull = hull_of(operand, b);
        const bool rows_too = layout.kind == Kind::padding_mask;
        found_.push_back({rows_too ? hull.first : 0, rows_too ? hull.last : q_len, hull.first, hull.last, 0});
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
  void block(int64_t b, int64_t first, int64_t count, const std::vector<Run>& runs, size_t& run,
             const PlanResult& result) {
    fill(first, count, runs, run);
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
      for (const PlanLayout& layout : request_.program.layouts) {
        if (layout.kind != Kind::padding_mask) continue;
        with_mask_row(request_.operands[layout.operand], b, [&](auto bits) {
          for (int64_t i = 0; i < count; i++) {
            const int32_t keep = bits[first + i] != 0 ? -1 : 0;
            start[i] &= keep;
            end[i] &= keep;
          }
        });
      }
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

}  // namespace

void write_spans(const PlanRequest& request, const PlanResult& result) {
  Layouts layouts(request);
  Evaluator evaluator(request);
  for (int64_t b = 0; b < request.batch; b++) {
    layouts.next(b);
    size_t run = 0;
    for (int64_t row = 0; row < request.q_len; row += block_rows) {
      evaluator.block(b, row, std::min(block_rows, request.q_len - row), layouts.runs(), run, result);
    }
  }
}

}  // namespace maskops
