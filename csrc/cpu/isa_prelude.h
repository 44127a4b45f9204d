// Headers of an instruction-set translation unit (isa_*.cpp). They come before the target pragma, so that nothing of
// the standard library is compiled for an instruction set that the machine may lack: the linker keeps one copy of an
// inline function for the whole library. For the same reason the .inc files use no template of the standard library.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attention.h"
#include "cross_entropy.h"
#include "decode.h"
#include "isa.h"
#include "matmul.h"
#include "softmax.h"
