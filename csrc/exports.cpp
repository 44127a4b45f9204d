// The only symbols that the binary exports. They concern the process, not tensors, and are called through ctypes.
#include "cpu/isa.h"

#define EXPORTED __attribute__((visibility("default")))
extern "C" {
EXPORTED const char* maskops_instruction_sets() { return maskops::instruction_sets(); }
EXPORTED const char* maskops_instruction_set() { return maskops::kernels().name; }
EXPORTED int maskops_select_instruction_set(const char* name) { return maskops::select_instruction_set(name) ? 1 : 0; }
}
