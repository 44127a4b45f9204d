// Cross-entropy on the CPU: what ops/cross_entropy.cpp calls.
#pragma once

#include "../cross_entropy.h"
#include "threads.h"

namespace maskops {

// A gradient of this size does not stay in the caches.
inline bool cross_entropy_streams(const CrossEntropyRows& rows) {
  return rows.n_rows * rows.vocabulary * bytes_of(rows.element) > (int64_t{1} << 25);
}

void cross_entropy_forward(const CrossEntropyForward& p, const Threads& threads);
void cross_entropy_backward(const CrossEntropyBackward& p, const Threads& threads);
// Both, where incoming gradients are known before the losses: the logits are read once. The outputs of the forward
// parameters are what the backward parameters read.
void cross_entropy_both(const CrossEntropyForward& forward, const CrossEntropyBackward& backward,
                        const Threads& threads);

}  // namespace maskops
