// Attention for CPUs with AVX2, FMA and F16C.

#if defined(__x86_64__)
#include "attend.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "attend_float.h"

namespace kvcfg {

using Avx2Math = FloatMath<2, 2, PlainTranspose>;
const Kernels kAvx2Kernels = {scratch_bytes_of<Avx2Math>, run_item<Avx2Math>, merge_partials};

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
