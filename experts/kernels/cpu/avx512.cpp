// AVX-512 without bf16 products: 16 floats a vector.

#include "kernels.h"
#include "target.h"

#if defined(MOIETY_X86)

#include "intrinsics.h"

MOIETY_TARGET("avx2,fma,f16c,popcnt,bmi,avx512f,avx512bw,avx512vl,avx512dq")
namespace avx512 {

#include "scalar.h"
#include "tiles.h"
#include "wide.h"

#define MOIETY_EXPAND
#include "expand.h"
#include "body.h"

}  // namespace avx512
MOIETY_TARGET_END

constexpr Kernels avx512_kernels = avx512::kernels_with(40, 24, nullptr);

#endif
