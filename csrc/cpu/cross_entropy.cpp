// The schedule of cross-entropy on the CPU. A row is computed by one task alone, so its result depends neither on the
// number of threads nor on the rows around it.
#include "cross_entropy.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

constexpr int64_t LEAST_BYTES = 1 << 17;   // logits of a task, at least,
constexpr int64_t MOST_BYTES = 1 << 22;    // and at most: two huge pages
constexpr int64_t TASKS_PER_WORKER = 2;    // of the rows that are left, as long as both allow it
constexpr int64_t ROW_OVERHEAD = 1 << 9;   // what a row costs beyond its logits, in bytes of logits
constexpr int64_t WORKER_BYTES = 1 << 18;  // waking a thread pays off for this much

int64_t row_bytes_of(const CrossEntropyRows& rows) { return rows.vocabulary * bytes_of(rows.element) + ROW_OVERHEAD; }
// Of a row whose gradient is 0: it is written, not computed.
int64_t cleared_bytes_of(const CrossEntropyRows& rows) { return row_bytes_of(rows) / 2; }
int workers_of(const CrossEntropyRows& rows, const Threads& threads) {
  const int64_t worthwhile = rows.n_rows * row_bytes_of(rows) / WORKER_BYTES;
  return static_cast<int>(std::clamp<int64_t>(worthwhile, 1, threads.count));
}

// Runs run(begin, end, worker) over all rows, of which a skipped one costs `bytes_of_skipped`. Tasks are long, for
// memory that is touched for the first time, where two threads in one huge page would both clear it, and for rows that
// are on their way while the one before them is computed. They become shorter towards the end, where threads would wait
// for one another.
template <class Run>
void run_rows(const CrossEntropyRows& rows, int64_t bytes_of_skipped, int workers, const Threads& threads,
              const Run& run) {
  struct Job {
    std::vector<int64_t> ends;  // of tasks
    const Run& run;
  };
  const int64_t row_bytes = row_bytes_of(rows);
  const auto cost_of = [&](int64_t row) { return rows.labels[row] < 0 ? bytes_of_skipped : row_bytes; };
  int64_t left = 0, cost = 0;
  for (int64_t row = 0; row < rows.n_rows; row++) left += cost_of(row);
  Job job{{}, run};
  int64_t most = 0;
  for (int64_t row = 0; row < rows.n_rows; row++) {
    if (cost == 0) most = std::clamp(left / (workers * TASKS_PER_WORKER), LEAST_BYTES, MOST_BYTES);
    cost += cost_of(row);
    if (row + 1 < rows.n_rows && (workers == 1 || cost + row_bytes <= most)) continue;
    job.ends.push_back(row + 1);
    left -= cost;
    cost = 0;
  }
  const auto run_task = [](int64_t task, int worker, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.run(task == 0 ? 0 : job.ends[static_cast<size_t>(task) - 1], job.ends[static_cast<size_t>(task)], worker);
  };
  threads.run(static_cast<int64_t>(job.ends.size()), workers, run_task, &job);
}

bool streams(const CrossEntropyBackward& p) { return cross_entropy_streams(p.rows) && p.grad_logits != p.rows.logits; }

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& p, const Threads& threads) {
  const auto fn = kernels().cross_entropy_forward;
  const auto run = [&](int64_t begin, int64_t end, int) { fn(p, begin, end); };
  run_rows(p.rows, ROW_OVERHEAD, workers_of(p.rows, threads), threads, run);
}

void cross_entropy_backward(const CrossEntropyBackward& p, const Threads& threads) {
  const auto fn = streams(p) ? kernels().cross_entropy_backward_streaming : kernels().cross_entropy_backward;
  const auto run = [&](int64_t begin, int64_t end, int) { fn(p, begin, end); };
  run_rows(p.rows, cleared_bytes_of(p.rows), workers_of(p.rows, threads), threads, run);
}

void cross_entropy_both(const CrossEntropyForward& forward, const CrossEntropyBackward& backward,
                        const Threads& threads) {
  const auto fn = streams(backward) ? kernels().cross_entropy_both_streaming : kernels().cross_entropy_both;
  const int workers = workers_of(forward.rows, threads);
  const std::vector<Memory> scratch = scratch_for(workers, kernels().cross_entropy_both_scratch(forward.rows));
  run_rows(forward.rows, cleared_bytes_of(forward.rows), workers, threads, [&](int64_t begin, int64_t end, int worker) {
    fn(forward, backward, begin, end, scratch[static_cast<size_t>(worker)].get());
  });
}

}  // namespace maskops
