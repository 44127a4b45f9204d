// The only symbols that the binary exports. They concern the process, not tensors, and are called through ctypes.
#include "cpu/isa.h"
#include "cuda/device.h"
#include "large_memory.h"
#include "task_trace.h"

#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED const char* maskops_instruction_sets() { return maskops::instruction_sets(); }
EXPORTED const char* maskops_instruction_set() { return maskops::kernels().name; }
// Why the CUDA kernels cannot run, nullptr when they can.
EXPORTED const char* maskops_cuda_reason() { return maskops::cuda_reason(); }
EXPORTED int maskops_select_instruction_set(const char* name) { return maskops::select_instruction_set(name) ? 1 : 0; }
// The limits of the machine, on the calling thread, with the instruction set in use; see cpu/limits.inc.
EXPORTED double maskops_limit_multiply_add(int64_t rounds) { return maskops::kernels().limit_multiply_add(rounds); }
EXPORTED double maskops_limit_multiply_pairs(int64_t rounds) { return maskops::kernels().limit_multiply_pairs(rounds); }
EXPORTED float maskops_limit_read(const float* x, int64_t n, int64_t way) {
  return maskops::kernels().limit_read(x, n, way);
}
EXPORTED int64_t maskops_limit_read_ways() { return maskops::LIMIT_READ_WAYS; }
EXPORTED void maskops_limit_copy(float* to, const float* from, int64_t n) {
  maskops::kernels().limit_copy(to, from, n);
}
// Returns memory that is kept for large results to the system; how many bytes.
EXPORTED int64_t maskops_release_memory() { return static_cast<int64_t>(maskops::release_large()); }
// Begins to write down what tasks take, or ends that where there is no memory to write to; the number of tasks since
// the last beginning. For one thread at a time.
EXPORTED int64_t maskops_trace_tasks(maskops::TaskTime* times, int64_t capacity) {
  static maskops::TaskTrace trace;
  const int64_t tasks = trace.tasks;
  trace = {times, capacity};
  maskops::task_trace.store(times == nullptr ? nullptr : &trace, std::memory_order_relaxed);
  return tasks;
}
}
