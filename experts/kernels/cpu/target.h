// MOIETY_TARGET("avx2,fma") ... MOIETY_TARGET_END: functions between them may use these
// instructions, whatever the compiler's flags, so that one library holds code for several CPUs.
// Nothing from the C++ standard library may be instantiated between them: the linker would merge
// such a template with the copy that every CPU runs.

#pragma once

#if defined(__x86_64__) || defined(MOIETY_EMULATE)
#define MOIETY_X86
#endif

#if defined(MOIETY_EMULATE) || \
    (defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11))
#define MOIETY_AMX
#endif

#define MOIETY_PRAGMA(text) _Pragma(#text)
#if defined(MOIETY_EMULATE)
#define MOIETY_TARGET(names)
#define MOIETY_TARGET_END
#elif defined(__clang__)
#define MOIETY_TARGET(names) \
  MOIETY_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define MOIETY_TARGET_END MOIETY_PRAGMA(clang attribute pop)
#else
#define MOIETY_TARGET(names) MOIETY_PRAGMA(GCC push_options) MOIETY_PRAGMA(GCC target(names))
#define MOIETY_TARGET_END MOIETY_PRAGMA(GCC pop_options)
#endif
