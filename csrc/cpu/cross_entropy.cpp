// The schedule of cross-entropy on the CPU. A row is computed by one task alone, so its result depends neither on the
// number of threads nor on the rows around it.
#include "cross_entropy.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

constexpr int64_t TASK_BYTES = 1 << 17;    // logits of a task, at least,
constexpr int64_t MOST_BYTES = 1 << 22;    // and at most: two huge pages
constexpr int64_t TASKS_PER_WORKER = 16;   // as long as both allow it
constexpr int64_t ROW_OVERHEAD = 1 << 9;   // what a row costs beyond its logits, in bytes of logits
constexpr int64_t WORKER_BYTES = 1 << 18;  // waking a thread pays off for this much

int64_t row_bytes_of(const CrossEntropyRows& rows) { return rows.vocabulary * bytes_of(rows.element) + ROW_OVERHEAD; }
int workers_of(const CrossEntropyRows& rows, const Threads& threads) {
  const int64_t worthwhile = rows.n_rows * row_bytes_of(rows) / WORKER_BYTES;
  return static_cast<int>(std::clamp<int64_t>(worthwhile, 1, threads.count));
}

// Runs run(begin, end, worker) over all rows. Long tasks are for memory that is touched for the first time, where two
// threads in one huge page would both clear it, and for rows that are on their way while the one before them is
// computed.
template <class Run>
void run_rows(const CrossEntropyRows& rows, int workers, const Threads& threads, const Run& run) {
  struct Job {
    const CrossEntropyRows& rows;
    const Run& run;
    int64_t rows_per_task;
  };
  const int64_t row_bytes = row_bytes_of(rows);
  const int64_t task_bytes = std::clamp(rows.n_rows * row_bytes / (workers * TASKS_PER_WORKER), TASK_BYTES, MOST_BYTES);
  Job job{rows, run, std::max<int64_t>(1, task_bytes / row_bytes)};
  const int64_t n_tasks = (rows.n_rows + job.rows_per_task - 1) / job.rows_per_task;
  const auto run_task = [](int64_t task, int worker, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t begin = task * job.rows_per_task;
    job.run(begin, std::min(begin + job.rows_per_task, job.rows.n_rows), worker);
  };
  threads.run(n_tasks, workers, run_task, &job);
}

bool streams(const CrossEntropyBackward& p) { return cross_entropy_streams(p.rows) && p.grad_logits != p.rows.logits; }

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& p, const Threads& threads) {
  const auto fn = kernels().cross_entropy_forward;
  run_rows(p.rows, workers_of(p.rows, threads), threads, [&](int64_t begin, int64_t end, int) { fn(p, begin, end); });
}

void cross_entropy_backward(const CrossEntropyBackward& p, const Threads& threads) {
  const auto fn = streams(p) ? kernels().cross_entropy_backward_streaming : kernels().cross_entropy_backward;
  run_rows(p.rows, workers_of(p.rows, threads), threads, [&](int64_t begin, int64_t end, int) { fn(p, begin, end); });
}

void cross_entropy_both(const CrossEntropyForward& forward, const CrossEntropyBackward& backward,
                        const Threads& threads) {
  const auto fn = streams(backward) ? kernels().cross_entropy_both_streaming : kernels().cross_entropy_both;
  const int workers = workers_of(forward.rows, threads);
  const std::vector<Memory> scratch = scratch_for(workers, kernels().cross_entropy_both_scratch(forward.rows));
  run_rows(forward.rows, workers, threads, [&](int64_t begin, int64_t end, int worker) {
    fn(forward, backward, begin, end, scratch[static_cast<size_t>(worker)].get());
  });
}

}  // namespace maskops
