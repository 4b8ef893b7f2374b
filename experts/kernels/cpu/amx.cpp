// AVX-512, and AMX for all but the fewest tokens.

#include "kernels.h"
#include "target.h"

#if defined(MOIETY_AMX)

#include "intrinsics.h"

MOIETY_TARGET("avx2,fma,f16c,popcnt,bmi,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vbmi2,prfchw,amx-tile,amx-bf16")
namespace amx {

#include "scalar.h"
#include "tiles.h"
#include "wide.h"

#define MOIETY_EXPAND
#include "expand.h"
#include "body.h"
#include "panels.h"
#include "pairs.h"

static constexpr Kernels kernels_with_panels(int64_t few_panels, int64_t few_pairs) {
  Kernels kernels = kernels_with(40, 24, nullptr);
  kernels.few_panels = few_panels;
  kernels.panels = panels;
  kernels.put_panels = put_panels;
  kernels.few_pairs = few_pairs;
  kernels.pairs = pairs;
  kernels.put_pairs = put_pairs;
  kernels.pair_up = pair_up;
  kernels.pair_sums = pair_sums;
  return kernels;
}

}  // namespace amx
MOIETY_TARGET_END

constexpr Kernels amx_kernels = amx::kernels_with_panels(5, 1);

#endif
