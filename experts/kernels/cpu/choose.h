// From values known at run time to template arguments.

#pragma once

// Runs a statement with the kind K.
#define FOR_KIND(kind, ...)                                     \
  switch (kind) {                                               \
    case BF16: { constexpr Kind K = BF16; __VA_ARGS__; break; } \
    case FP16: { constexpr Kind K = FP16; __VA_ARGS__; break; } \
    case FP32: { constexpr Kind K = FP32; __VA_ARGS__; break; } \
    case INT8: { constexpr Kind K = INT8; __VA_ARGS__; break; } \
    default: { constexpr Kind K = INT4; __VA_ARGS__; }          \
  }

// The same for a kind that is multiplied as bf16.
#define FOR_BF16_KIND(kind, ...)                                \
  switch (kind) {                                               \
    case BF16: { constexpr Kind K = BF16; __VA_ARGS__; break; } \
    case INT8: { constexpr Kind K = INT8; __VA_ARGS__; break; } \
    default: { constexpr Kind K = INT4; __VA_ARGS__; }          \
  }

// Both for tiles, which have one kind more.
#define OR_BF12(FOR, kind, ...)                                 \
  if ((kind) == BF12) {                                         \
    constexpr Kind K = BF12;                                    \
    __VA_ARGS__;                                                \
  } else {                                                      \
    FOR(kind, __VA_ARGS__)                                      \
  }
#define FOR_TILE_KIND(kind, ...) OR_BF12(FOR_KIND, kind, __VA_ARGS__)
#define FOR_BF16_TILE_KIND(kind, ...) OR_BF12(FOR_BF16_KIND, kind, __VA_ARGS__)

// Runs a statement with the number N, from 1 to 8.
#define FOR_NUMBER(number, ...)                         \
  switch (number) {                                     \
    case 1: { constexpr int N = 1; __VA_ARGS__; break; } \
    case 2: { constexpr int N = 2; __VA_ARGS__; break; } \
    case 3: { constexpr int N = 3; __VA_ARGS__; break; } \
    case 4: { constexpr int N = 4; __VA_ARGS__; break; } \
    case 5: { constexpr int N = 5; __VA_ARGS__; break; } \
    case 6: { constexpr int N = 6; __VA_ARGS__; break; } \
    case 7: { constexpr int N = 7; __VA_ARGS__; break; } \
    default: { constexpr int N = 8; __VA_ARGS__; }       \
  }
