// The schedule of the masked softmax on the CPU. A row (or a strip of lanes) is computed by one task alone, and a lane
// does not depend on the lanes beside it: results are the same for any number of threads.
#include "softmax.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"

namespace maskops {
namespace {

constexpr int64_t TASK_BYTES = 1 << 17;     // elements of a task
constexpr int64_t STRIP_OVERHEAD = 1 << 7;  // what a strip costs beyond its elements, in bytes
constexpr int64_t WORKER_BYTES = 1 << 18;   // waking a thread pays off for this much

struct Free {
  void operator()(char* memory) const { std::free(memory); }
};

template <class Parameters>
void run_strips(const Parameters& p, const Threads& threads, size_t scratch_bytes,
                void (*fn)(const Parameters&, int64_t begin, int64_t end, char* scratch)) {
  struct Job {
    const Parameters& p;
    int64_t n_strips, strips_per_task;
    void (*fn)(const Parameters&, int64_t begin, int64_t end, char* scratch);
    std::vector<std::unique_ptr<char, Free>> scratch;
  };
  const SoftmaxShape& shape = p.shape;
  const int64_t width = std::min<int64_t>(shape.lanes, kernels().softmax_width);
  const int64_t n_strips = shape.outer_count * ((shape.lanes + width - 1) / width);
  const int64_t strip_bytes = shape.length * width * bytes_of(shape.element) + STRIP_OVERHEAD;
  Job job{p, n_strips, std::max<int64_t>(1, TASK_BYTES / strip_bytes), fn, {}};
  const int64_t n_tasks = (n_strips + job.strips_per_task - 1) / job.strips_per_task;
  // In double: lengths by strides of 0 may exceed what memory could hold.
  const double useful = static_cast<double>(n_strips) * static_cast<double>(strip_bytes) / WORKER_BYTES;
  const int workers = static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(threads.count)));
  // Allocated before the team starts: a task cannot fail.
  for (int worker = 0; worker < workers; worker++) {
    job.scratch.emplace_back(static_cast<char*>(std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64)));
    if (job.scratch.back() == nullptr) throw std::bad_alloc();
  }
  const auto run_task = [](int64_t task, int worker, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t begin = task * job.strips_per_task;
    job.fn(job.p, begin, std::min(begin + job.strips_per_task, job.n_strips), job.scratch[worker].get());
  };
  threads.run(n_tasks, workers, run_task, &job);
}

}  // namespace

void softmax_forward(const SoftmaxForward& p, const Threads& threads) {
  run_strips(p, threads, kernels().softmax_forward_scratch(p), kernels().softmax_forward);
}

void softmax_backward(const SoftmaxBackward& p, const Threads& threads) {
  run_strips(p, threads, kernels().softmax_backward_scratch(p), kernels().softmax_backward);
}

}  // namespace maskops
