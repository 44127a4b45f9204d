// What each task of a call takes, for benchmarks/schedule.py: simulations of many threads take their costs from here.
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdint>

namespace maskops {

// A region is one run of tasks, which ends before the next one begins.
struct TaskTime {
  int64_t region;
  int64_t most_workers;  // that the schedule would have let run the region's tasks
  int64_t nanoseconds;   // of the processor
  int64_t chain;         // tasks of one chain of a region add to the same sums, one behind the other; -1 for none
  int64_t keys;          // of a task of a chain, in whose sums the next one follows it
};

struct TaskTrace {
  TaskTime* times;
  int64_t capacity;
  int64_t tasks = 0;  // those beyond the capacity are counted, and not written
  int64_t regions = 0;

  void add(int64_t most_workers, int64_t nanoseconds, int64_t chain = -1, int64_t keys = 0) {
    if (tasks < capacity) times[tasks] = {regions, most_workers, nanoseconds, chain, keys};
    tasks++;
  }

  // Time of this thread alone where the system counts it: what else the machine does stays out of the costs.
  static int64_t now() {
#ifdef CLOCK_THREAD_CPUTIME_ID
    timespec time;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0) return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
#endif
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
};

// Where it is set, every region runs on its calling thread alone, in order, and leaves its times here.
inline std::atomic<TaskTrace*> task_trace{nullptr};

}  // namespace maskops
