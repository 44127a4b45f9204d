// The schedule of cross-entropy on the CPU. A row is computed by one task alone, so its result depends neither on the
// number of threads nor on the rows around it.
#include "cross_entropy.h"

#include <algorithm>

#include "isa.h"

namespace maskops {
namespace {

constexpr int64_t TASK_BYTES = 1 << 17;    // logits of a task
constexpr int64_t ROW_OVERHEAD = 1 << 9;   // what a row costs beyond its logits, in bytes of logits
constexpr int64_t WORKER_BYTES = 1 << 18;  // waking a thread pays off for this much
constexpr int64_t STREAM_BYTES = 1 << 25;  // a gradient above this does not stay in the caches

template <class Parameters>
void run_rows(const Parameters& p, const Threads& threads, void (*fn)(const Parameters&, int64_t begin, int64_t end)) {
  struct Job {
    const Parameters& p;
    int64_t rows_per_task;
    void (*fn)(const Parameters&, int64_t begin, int64_t end);
  };
  const int64_t row_bytes = p.rows.vocabulary * bytes_of(p.rows.element) + ROW_OVERHEAD;
  Job job{p, std::max<int64_t>(1, TASK_BYTES / row_bytes), fn};
  const int64_t n_tasks = (p.rows.n_rows + job.rows_per_task - 1) / job.rows_per_task;
  const int64_t workers = std::clamp<int64_t>(p.rows.n_rows * row_bytes / WORKER_BYTES, 1, threads.count);
  const auto run_task = [](int64_t task, int, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t begin = task * job.rows_per_task;
    job.fn(job.p, begin, std::min(begin + job.rows_per_task, job.p.rows.n_rows));
  };
  threads.run(n_tasks, static_cast<int>(workers), run_task, &job);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& p, const Threads& threads) {
  run_rows(p, threads, kernels().cross_entropy_forward);
}

void cross_entropy_backward(const CrossEntropyBackward& p, const Threads& threads) {
  const int64_t bytes = p.rows.n_rows * p.rows.vocabulary * bytes_of(p.rows.element);
  const bool stream = bytes > STREAM_BYTES && p.grad_logits != p.rows.logits;
  run_rows(p, threads, stream ? kernels().cross_entropy_backward_streaming : kernels().cross_entropy_backward);
}

}  // namespace maskops
