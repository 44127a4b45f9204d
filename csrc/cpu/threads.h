// How torch-free kernels get threads: the caller hands in a function that runs tasks on a team.
#pragma once

#include <cstdint>

namespace maskops {

struct Threads {
  // Runs fn(task, worker, context) once for every task in [0, n_tasks) with worker < max_workers; tasks start in order.
  void (*run)(int64_t n_tasks, int max_workers, void (*fn)(int64_t task, int worker, void* context), void* context);
  int count;  // the most workers that a run can have
};

}  // namespace maskops
