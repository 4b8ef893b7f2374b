// The library's plain C interface, called through ctypes. Every function that can fail gives a
// Status; shapes and dtypes were checked by the caller, masks are checked here.

#if defined(__linux__)
#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "convert.h"
#include "driver.h"
#include "shorten.h"

#define MOIETY_API extern "C" __attribute__((visibility("default")))

#if defined(MOIETY_AMX) && !defined(MOIETY_EMULATE)
// AMX's registers are 8 KB, so Linux gives them only to processes that ask.
static bool allowed_amx() {
#if defined(__linux__)
  constexpr unsigned TILE = 1u << 24, BF16_PRODUCTS = 1u << 22, EXPANSION = 1u << 6;
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d;
  const bool known = __get_cpuid_count(7, 0, &a, &b, &c, &d);
  return known && (c & EXPANSION) && (d & TILE) && (d & BF16_PRODUCTS) &&
         syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

static bool has(int32_t isa) {
#if defined(MOIETY_EMULATE)
  return isa >= PORTABLE && isa <= AMX;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt") &&
                    __builtin_cpu_supports("bmi");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (isa == AVX2) return avx2;
  if (isa == AVX512) return avx512;
  const bool products = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == AVX512_BF16) return products;
#if defined(MOIETY_AMX)
  static const bool amx = products && allowed_amx();
  if (isa == AMX) return amx;
#endif
  return isa == PORTABLE;
#else
  return isa == PORTABLE;
#endif
}

static const Kernels *kernels_of(int32_t isa) {
  if (!has(isa)) return nullptr;
#if defined(MOIETY_X86)
  if (isa == AVX2) return &avx2_kernels;
  if (isa == AVX512) return &avx512_kernels;
  if (isa == AVX512_BF16) return &avx512_bf16_kernels;
#endif
#if defined(MOIETY_AMX)
  if (isa == AMX) return &amx_kernels;
#endif
  return &portable_kernels;
}

// 1 where this CPU can run an instruction set's kernels.
MOIETY_API int32_t moiety_has(int32_t isa) { return has(isa); }

// The fastest that this CPU can run. On Intel's, bf16 products with inputs chosen one by one take
// longer than twice as many fp32 multiply-adds (measured on Emerald Rapids); on AMD's Zen 4 it is
// the other way round.
MOIETY_API int32_t moiety_best() {
  int32_t best = AMX;
  while (!has(best)) best--;
#if defined(__x86_64__) && !defined(MOIETY_EMULATE)
  if (best == AVX512_BF16 && __builtin_cpu_is("intel")) best = AVX512;
#endif
  return best;
}

MOIETY_API int32_t moiety_starts(const Matrix *from, int32_t threads, int64_t *starts) {
  return starts_of(*from, threads, starts);
}

MOIETY_API int64_t moiety_tile_bytes(int32_t kind, int64_t rows, int64_t columns) {
  return tile_bytes(kind, rows, columns);
}

MOIETY_API int64_t moiety_bf12_bytes(const Matrix *from, int32_t threads, int64_t *apart) {
  return bf12_bytes(*from, threads, apart);
}

// Without `apart` as tiles of their own kind, else as moiety_bf12_bytes found them. The tiles of a
// matrix begin `step` bytes after those before, which is at least what the one or the other size is.
MOIETY_API int32_t moiety_tile(const Matrix *from, int32_t threads, const int64_t *apart,
                               int64_t step, uint8_t *tiles) {
  return tile(*from, threads, apart, step, tiles);
}

MOIETY_API int32_t moiety_untile(const Matrix *from, int32_t threads, uint8_t *values,
                                 uint8_t *mask, uint16_t *scale) {
  return untile(*from, threads, values, mask, scale);
}

MOIETY_API int32_t moiety_dense(int32_t isa, const Matrix *from, int64_t which, int32_t threads,
                                 int32_t bf16, void *dense) {
  const Kernels *kernels = kernels_of(isa);
  if (!kernels || threads < 1) return BAD_ARGUMENT;
  return expand(*kernels, *from, which, threads, bf16, dense);
}

// Memory that is not there yet comes in pages of 2 MB where the system has them: taking it 4 KB at a
// time lasts as long as a product whose results it is for.
MOIETY_API void moiety_large_pages([[maybe_unused]] void *from, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20;
  const uintptr_t first = ((uintptr_t)from + PAGE - 1) / PAGE * PAGE;
  const uintptr_t end = ((uintptr_t)from + bytes) / PAGE * PAGE;
  if (first < end) madvise((void *)first, end - first, MADV_HUGEPAGE);
#endif
}

// `gate_up`, `routes` and `base` may be null; see Call. With AVX kernels `down` may be one
// dense matrix for all tokens.
MOIETY_API int32_t moiety_forward(int32_t isa, int32_t threads, const Matrix *gate_up,
                                  const Matrix *down, int32_t activation, const Tokens *x,
                                  const Routes *routes, const void *base, void *out) {
  const Kernels *kernels = kernels_of(isa);
  if (!kernels || threads < 1) return BAD_ARGUMENT;
  if (down->layout == DENSE || (gate_up && gate_up->layout == DENSE)) {
    const bool known = down->kind == BF16 || down->kind == FP32;
    if (kernels == &portable_kernels || gate_up || routes || down->count != 1 || !known)
      return BAD_ARGUMENT;
  }
  return forward({kernels, threads, gate_up, down, activation, *x, routes, base, out});
}
