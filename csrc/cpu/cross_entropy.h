// Cross-entropy on the CPU: what ops/cross_entropy.cpp calls.
#pragma once

#include "../cross_entropy.h"
#include "threads.h"

namespace maskops {

void cross_entropy_forward(const CrossEntropyForward& p, const Threads& threads);
void cross_entropy_backward(const CrossEntropyBackward& p, const Threads& threads);

}  // namespace maskops
