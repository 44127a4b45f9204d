// The only symbols that the binary exports. They concern the process, not tensors, and are called through ctypes.
#include "cpu/isa.h"
#include "cuda/device.h"

#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED const char* maskops_instruction_sets() { return maskops::instruction_sets(); }
EXPORTED const char* maskops_instruction_set() { return maskops::kernels().name; }
// Why the CUDA kernels cannot run, nullptr when they can.
EXPORTED const char* maskops_cuda_reason() { return maskops::cuda_reason(); }
EXPORTED int maskops_select_instruction_set(const char* name) { return maskops::select_instruction_set(name) ? 1 : 0; }
}
