// Spans to tiles: key_valid, the work list of query tiles, and its transpose, the bounds of key tiles.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace maskops {
namespace {

// The masks that say which keys are there at all: all that tiles take from the layouts.
std::vector<const PlanOperand*> key_masks_of(const PlanRequest& request) {
  std::vector<const PlanOperand*> masks;
  for (const PlanLayout& layout : request.program.layouts) {
    if (layout.kind == PlanLayout::Kind::padding_mask || layout.kind == PlanLayout::Kind::key_mask) {
      masks.push_back(&request.operands[layout.operand]);
    }
  }
  return masks;
}

// ---- query tiles ----

struct Segment {
  int64_t begin, end;
  int32_t low, high;  // hull of the keys; low > high where no row sees any
};

struct Item {
  int64_t first, rows;
};

// The items that kernels run over, batch element after batch element.
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
        result_(result),
        key_masks_(key_masks_of(request)) {
    if (n_spans_ > 1) {
      first_.resize(static_cast<size_t>(q_len_));
      last_.resize(static_cast<size_t>(q_len_));
    }
  }

  // Appends the items of batch element b and writes its key_valid.
  void add(int64_t b) {
    const int32_t* start = result_.start + b * q_len_;
    const int32_t* end = result_.end + b * q_len_;
    const int32_t *first = start, *last = end;
    if (n_spans_ > 1) {
      find_hulls(start, end);
      first = first_.data();
      last = last_.data();
    }
    find_segments(first, last, segments_);
    write_key_valid(b, start, end);
    choose_items();
    for (const Item& item : items_) write(b, item, start, end, first, last);
  }

  void finish() {
    const int64_t unused = capacity_ - used_;
    std::fill_n(result_.tiles + used_ * width_, unused * width_, 0);
    *result_.tile_count = static_cast<int32_t>(used_);
    if (result_.order == nullptr) return;
    std::iota(result_.order, result_.order + capacity_, 0);  // unused items are last already
    std::stable_sort(result_.order, result_.order + used_, [this](int32_t a, int32_t b) {
      return result_.tiles[a * width_ + 3] > result_.tiles[b * width_ + 3];
    });
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

  void write_key_valid(int64_t b, const int32_t* start, const int32_t* end) {
    uint8_t* const valid = result_.key_valid + b * k_len_;
    if (n_spans_ == 1) {
      std::fill_n(valid, k_len_, uint8_t{0});
      for (const Segment& segment : segments_) {
        if (segment.high > segment.low) {
          std::memset(valid + segment.low, 1, static_cast<size_t>(segment.high - segment.low));
        }
      }
    } else {
      write_union(start, end, valid);
    }
    valid_before_.clear();
    if (key_masks_.empty()) return;
    for (const PlanOperand* mask : key_masks_) {
      with_mask_row(*mask, b, [&](auto bits) {
        for (int64_t j = 0; j < k_len_; j++) valid[j] &= bits[j] != 0;
      });
    }
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
      bool partial = mixed != 0 || high == 0 || full_high <= full_low;
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
  const std::vector<const PlanOperand*> key_masks_;
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

// The bounds of every key tile: which rows see it, and which of them as a whole.
class KeyTiles {
 public:
  KeyTiles(const PlanRequest& request, const PlanResult& result)
      : batch_(request.batch),
        q_len_(request.q_len),
        k_len_(static_cast<int32_t>(request.k_len)),
        n_tiles_((request.k_len + key_tile - 1) / key_tile),
        has_holes_(!key_masks_of(request).empty()),
        result_(result) {}

  void add(int64_t span, int64_t b) {
    const int64_t row = (span * batch_ + b) * q_len_;
    find_runs(result_.start + row, result_.end + row);
    int32_t* const out = result_.key_tiles + (span * batch_ + b) * n_tiles_ * 4;
    std::fill_n(out, n_tiles_ * 4, 0);
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
      if (accepted && has_holes_) {
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
  const bool has_holes_;
  const PlanResult& result_;
  FirstReach see_, whole_;
  std::vector<RowRun> runs_;
  std::vector<int32_t> covering_;  // +rows where a run begins to cover whole tiles, -rows where it stops
};

}  // namespace

void write_tiles(const PlanRequest& request, const PlanResult& result) {
  WorkList work_list(request, result);
  KeyTiles key_tiles(request, result);
  for (int64_t b = 0; b < request.batch; b++) {
    work_list.add(b);
    if (result.key_tiles == nullptr) continue;
    for (int64_t span = 0; span < request.program.n_spans(); span++) key_tiles.add(span, b);
  }
  work_list.finish();
}

}  // namespace maskops
