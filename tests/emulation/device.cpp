// The processor as a device with two multiprocessors, of compute capability 9.0 unless a test chooses another one.
#include "../../csrc/cuda/device.h"

#include <cstring>

#include "../../csrc/cuda/plan.h"
#include "emulation.h"

#define MASKOPS_FOR_TESTS extern "C" __attribute__((visibility("default")))

namespace maskops {

static Device emulated{9, 0, 2, 227 << 10};

MASKOPS_FOR_TESTS void maskops_emulate_capability(int major, int minor) {
  emulated.major = major;
  emulated.minor = minor;
}

// Launches of kernels since the library was loaded.
MASKOPS_FOR_TESTS int64_t maskops_emulated_launches() { return emulation::launches; }

// Bytes of scratch that a plan takes.
MASKOPS_FOR_TESTS int64_t maskops_plan_scratch(int32_t batch, int32_t q_len, int32_t k_len, int32_t n_spans,
                                               int32_t has_holes) {
  DevicePlan p{};
  p.batch = batch;
  p.q_len = q_len;
  p.k_len = k_len;
  p.n_spans = n_spans;
  p.has_holes = has_holes != 0;
  plan_blocks(p);
  return plan_scratch(p) * static_cast<int64_t>(sizeof(int32_t));
}

const char* cuda_reason() { return nullptr; }

const char* device_reason(int32_t index) {
  static std::string reason;
  reason = why_not_on(emulated, index);
  return reason.empty() ? nullptr : reason.c_str();
}

const Device& device(int32_t) { return emulated; }

void* current_stream(int32_t) { return nullptr; }

void clear_cuda(void* data, int64_t bytes, void*) { std::memset(data, 0, static_cast<size_t>(bytes)); }

DeviceGuard::DeviceGuard(int32_t) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace maskops
