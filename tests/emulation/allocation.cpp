// Allocations that fail when a test wants them to: stands between the bindings and torch.
#include <algorithm>
#include <utility>

#include "../../csrc/torch_abi.h"

// The bindings call the function below by the name of torch's, see tools/emulation.py.
#undef aoti_torch_empty_strided
extern "C" AOTITorchError aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                                   AtenTensorHandle*);

namespace {
int64_t good_allocations = -1;  // until one fails; negative: none does
int64_t largest = 0;
}  // namespace

#define MASKOPS_FOR_TESTS extern "C" __attribute__((visibility("default")))

MASKOPS_FOR_TESTS void maskops_emulate_failing_allocation(int64_t after) { good_allocations = after; }

// Elements of the largest allocation since this was asked before.
MASKOPS_FOR_TESTS int64_t maskops_emulated_largest_allocation() { return std::exchange(largest, 0); }

MASKOPS_FOR_TESTS AOTITorchError maskops_emulated_empty_strided(int64_t dim, const int64_t* sizes,
                                                                const int64_t* strides, int32_t dtype,
                                                                int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* result) {
  int64_t elements = 1;
  for (int64_t i = 0; i < dim; i++) elements *= sizes[i];
  largest = std::max(largest, elements);
  if (good_allocations < 0 || good_allocations-- > 0) {
    return aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, result);
  }
  // As a device without memory: torch itself fails, with an error of its own.
  const int64_t more_than_there_is[] = {int64_t{1} << 55};
  const int64_t one[] = {1};
  return aoti_torch_empty_strided(1, more_than_there_is, one, dtype, device_type, device_index, result);
}
