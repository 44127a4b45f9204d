// The schedule of the masked softmax on the CPU. A row (or a strip of lanes) is computed by one task alone, and a lane
// does not depend on the lanes beside it: results are the same for any number of threads.
#include "softmax.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace maskops {
namespace {

constexpr int64_t TASK_BYTES = 1 << 17;     // elements of a task
constexpr int64_t STRIP_OVERHEAD = 1 << 7;  // what a strip costs beyond its elements, in bytes
constexpr int64_t WORKER_BYTES = 1 << 18;   // waking a thread pays off for this much
// Results of this size may lie in memory that nobody touched before (../large_memory.h). Where two threads touch a page
// of that memory at once, both clear it, so that each takes whole pages. Smaller results are a few such pages, too few
// to share out evenly.
constexpr int64_t FRESH_BYTES = 32 << 20;
constexpr int64_t HUGE_PAGE = 2 << 20;

// The strips of each task: where it begins, and the end.
std::vector<int64_t> tasks_of(int64_t n_strips, int64_t strip_bytes, const void* results, int64_t result_bytes,
                              const Threads& threads) {
  std::vector<int64_t> begins;
  if (result_bytes < FRESH_BYTES || result_bytes / HUGE_PAGE < 4 * threads.count) {
    const int64_t strips_per_task = std::max<int64_t>(1, TASK_BYTES / strip_bytes);
    for (int64_t begin = 0; begin < n_strips; begin += strips_per_task) begins.push_back(begin);
  } else {
    // The results of the strips lie one behind the other, but for the strips of lanes, which share pages anyway.
    const double bytes_of_strip = static_cast<double>(result_bytes) / static_cast<double>(n_strips);
    const auto before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(results) % HUGE_PAGE);
    for (int64_t end = -before; end < result_bytes; end += HUGE_PAGE) {
      const auto begin = static_cast<int64_t>(static_cast<double>(std::max<int64_t>(end, 0)) / bytes_of_strip);
      if (begins.empty() || begin > begins.back()) begins.push_back(begin);
    }
  }
  begins.push_back(n_strips);
  return begins;
}

template <class Parameters>
void run_strips(const Parameters& p, const SoftmaxOperand& results, const Threads& threads, size_t scratch_bytes,
                void (*fn)(const Parameters&, int64_t begin, int64_t end, char* scratch)) {
  struct Job {
    const Parameters& p;
    std::vector<int64_t> begins;
    void (*fn)(const Parameters&, int64_t begin, int64_t end, char* scratch);
    std::vector<Memory> scratch;
  };
  const SoftmaxShape& shape = p.shape;
  const int64_t width = std::min<int64_t>(shape.lanes, kernels().softmax_width);
  const int64_t n_strips = shape.outer_count * ((shape.lanes + width - 1) / width);
  const int64_t strip_bytes = shape.length * width * bytes_of(shape.element) + STRIP_OVERHEAD;
  // In double: lengths by strides of 0 may exceed what memory could hold.
  const double useful = static_cast<double>(n_strips) * static_cast<double>(strip_bytes) / WORKER_BYTES;
  const int workers = static_cast<int>(std::clamp(useful, 1.0, static_cast<double>(threads.count)));
  const int64_t result_bytes = shape.outer_count * shape.length * shape.lanes * bytes_of(shape.element);
  Job job{p, tasks_of(n_strips, strip_bytes, results.data, result_bytes, threads), fn,
          scratch_for(workers, scratch_bytes)};
  const auto run_task = [](int64_t task, int worker, void* context) {
    const Job& job = *static_cast<const Job*>(context);
    job.fn(job.p, job.begins[task], job.begins[task + 1], job.scratch[worker].get());
  };
  threads.run(static_cast<int64_t>(job.begins.size()) - 1, workers, run_task, &job);
}

}  // namespace

void softmax_forward(const SoftmaxForward& p, const Threads& threads) {
  run_strips(p, p.weights, threads, kernels().softmax_forward_scratch(p), kernels().softmax_forward);
}

void softmax_backward(const SoftmaxBackward& p, const Threads& threads) {
  run_strips(p, p.grad_x, threads, kernels().softmax_backward_scratch(p), kernels().softmax_backward);
}

}  // namespace maskops
