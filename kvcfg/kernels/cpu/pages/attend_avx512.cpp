// Attention for CPUs with AVX-512, its 8-bit dot products (VNNI) and those of bfloat16.
//
//     int8 pages                             8-bit products; queries and weights in two digits of 8 bits
//     bfloat16, 8-bit floats, 4-bit codes,   products of bfloat16; queries and weights in two parts where queries
//       also beside int8                     are float32, else in one
//     float32, float16, also beside others   float32

#if defined(__x86_64__)
#include "attend.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c")
#endif

#include "attend_bfloat16.h"
#include "attend_float.h"
#include "attend_vnni.h"

namespace kvcfg {
namespace {

struct FastTranspose {
    KVCFG_INLINE static void of(Floats* rows) { transpose(reinterpret_cast<__m512i*>(rows)); }
};

using ExactMath = FloatMath<4, 4, FastTranspose>;

enum class Numbers { kInt8, kBFloat16, kFloat32 };

Numbers numbers_of(const AttendCall& call) {
    bool all_int8 = true;
    const PageLayout* layouts[] = {call.layout, call.open_pages == nullptr ? call.layout : call.open_layout};
    for (const PageLayout* layout : layouts) {
        const int64_t formats[] = {layout->keys.format, layout->values.format};
        for (int64_t format : formats) {
            if (format == kFloat32 || format == kFloat16) return Numbers::kFloat32;
            all_int8 = all_int8 && format == kInt8;
        }
    }
    return all_int8 ? Numbers::kInt8 : Numbers::kBFloat16;
}

int64_t scratch_bytes(const AttendCall& call, const Item& item) {
    switch (numbers_of(call)) {
        case Numbers::kInt8: return scratch_bytes_of<VnniMath>(call, item);
        case Numbers::kFloat32: return scratch_bytes_of<ExactMath>(call, item);
        default: return scratch_bytes_of<BFloat16Math<2>>(call, item);
    }
}

void run(const AttendCall& call, const Item& item, uint8_t* scratch) {
    switch (numbers_of(call)) {
        case Numbers::kInt8: return run_item<VnniMath>(call, item, scratch);
        case Numbers::kFloat32: return run_item<ExactMath>(call, item, scratch);
        default: break;
    }
    if (call.query_type == kFloat32) return run_item<BFloat16Math<2>>(call, item, scratch);
    run_item<BFloat16Math<1>>(call, item, scratch);
}

}  // namespace

const Kernels kAvx512Kernels = {scratch_bytes, run, merge_partials};

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
