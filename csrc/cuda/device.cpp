// A binary without CUDA kernels.
#include "device.h"

namespace maskops {

const char* cuda_reason() { return "this build holds no CUDA kernels"; }

}  // namespace maskops
