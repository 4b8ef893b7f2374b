// AVX-512 with bf16 products: one instruction multiplies and adds both kept values of 16 rows.

#include "kernels.h"
#include "target.h"

#if defined(MOIETY_X86)

#include "intrinsics.h"

MOIETY_TARGET("avx2,fma,f16c,popcnt,bmi,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
namespace avx512_bf16 {

#include "scalar.h"
#include "tiles.h"
#include "wide.h"

#define MOIETY_EXPAND
#include "expand.h"
#include "body.h"
#include "dots.h"

}  // namespace avx512_bf16
MOIETY_TARGET_END

constexpr Kernels avx512_bf16_kernels = avx512_bf16::kernels_with(40, 24, avx512_bf16::dots);

#endif
