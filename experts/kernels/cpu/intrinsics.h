// The compiler's intrinsics, or SIMDe's portable ones (https://github.com/simd-everywhere/simde)
// to test every instruction set's code on a CPU that lacks it.

#pragma once

#if defined(MOIETY_EMULATE)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include "emulate.h"
#define MOIETY_IN_REGISTER(vector) (void)(vector)
#else
#include <immintrin.h>
// Loaded once, not again by every instruction that takes it from memory.
#define MOIETY_IN_REGISTER(vector) __asm__("" : "+v"(vector))
#endif
