// The masked softmax on CUDA: its launchers.
#pragma once

#include "../softmax.h"

namespace maskops {

// `spans.valid_before` is not read. Throw where a launch fails.
void softmax_forward_cuda(const SoftmaxForward& p, void* stream);
void softmax_backward_cuda(const SoftmaxBackward& p, void* stream);

}  // namespace maskops
