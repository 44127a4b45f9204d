// Masked softmax on the CPU: what ops/softmax.cpp calls.
#pragma once

#include "../softmax.h"
#include "threads.h"

namespace maskops {

void softmax_forward(const SoftmaxForward& p, const Threads& threads);
void softmax_backward(const SoftmaxBackward& p, const Threads& threads);

}  // namespace maskops
