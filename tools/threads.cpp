// Loaded before torch by the build under ThreadSanitizer: the parallel loops of the extension run on threads that the
// sanitizer sees. torch's own pool is OpenMP's, whose barriers are invisible to it: every result that one thread hands
// to another would look like a race.
#include <cstdint>
#include <thread>
#include <vector>

extern "C" {

__attribute__((visibility("default"))) int32_t torch_get_num_threads(uint32_t* count) {
  *count = 3;
  return 0;
}

__attribute__((visibility("default"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t,
                                                                  void (*function)(int64_t, int64_t, void*),
                                                                  void* context) {
  std::vector<std::thread> team;
  for (int64_t worker = begin + 1; worker < end; worker++) team.emplace_back(function, worker, worker + 1, context);
  function(begin, begin + 1, context);
  for (std::thread& member : team) member.join();
  return 0;
}
}
