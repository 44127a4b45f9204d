// Cross-entropy on CUDA: what its launchers take beside the plain parameters, and what both passes share.
#pragma once

#include "../cross_entropy.h"
#include "device.h"

namespace maskops {

// Labels as they come, which only the device reads. A row whose label is ignore_index is skipped. A label outside the
// vocabulary is followed nowhere: the row's loss, log-probability and gradient are NaN.
struct CudaLabels {
  const void* values;
  int64_t stride;
  int64_t ignore_index;
  bool wide;  // int64, else int32
};

// `rows.labels` are nullptr in either; there is a row or more. Throw where a launch fails.
void cross_entropy_forward_cuda(const CrossEntropyForward& p, const CudaLabels& labels, const Device& device,
                                void* stream);
void cross_entropy_backward_cuda(const CrossEntropyBackward& p, const CudaLabels& labels, void* stream);

// Both passes of the same rows, without gradients of probabilities. Where a row fits on chip its logits are read once
// and their gradient is written once.
void cross_entropy_both_cuda(const CrossEntropyForward& forward, const CrossEntropyBackward& backward,
                             const CudaLabels& labels, const Device& device, void* stream);

}  // namespace maskops
