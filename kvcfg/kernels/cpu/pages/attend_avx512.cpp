// Attention for CPUs with AVX-512 and its dot products of bytes (VNNI): int8 pages in those, all others in float32.

#if defined(__x86_64__)
#include "attend.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")
#endif

#include "attend_fused.h"
#include "attend_vnni.h"

namespace kvcfg {
namespace {

bool all_int8(const AttendCall& call) {
    const PageLayout& open = call.open_pages == nullptr ? *call.layout : *call.open_layout;
    return call.layout->keys.format == kInt8 && call.layout->values.format == kInt8 && open.keys.format == kInt8 &&
           open.values.format == kInt8;
}

int64_t scratch_bytes(const AttendCall& call, const Item& item) {
    return all_int8(call) ? scratch_bytes_of<VnniMath>(call, item) : scratch_bytes_of<FusedMath>(call, item);
}

void run(const AttendCall& call, const Item& item, uint8_t* scratch) {
    all_int8(call) ? run_item<VnniMath>(call, item, scratch) : run_item<FusedMath>(call, item, scratch);
}

}  // namespace

const Kernels kAvx512Kernels = {scratch_bytes, run, merge_partials};

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
