// Attention for CPUs with AVX-512 and its dot products of whole numbers (VNNI).
//
//     int8 pages                                   products of bytes
//     e4m3 with scales, 4-bit codes, and int8      products of 16-bit numbers
//       beside them, heads of up to 128
//     all others                                   float32

#if defined(__x86_64__)
#include "attend.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c")
#endif

#include "attend_fused.h"
#include "attend_vnni.h"
#include "attend_words.h"

namespace kvcfg {
namespace {

enum class Numbers { kBytes, kWords, kFloats };

Numbers numbers_of(const AttendCall& call) {
    bool bytes = true, words = call.layout->keys.dim <= WordMath::kWidest;
    const PageLayout* layouts[] = {call.layout, call.open_pages == nullptr ? call.layout : call.open_layout};
    for (const PageLayout* layout : layouts) {
        const SideLayout* sides[] = {&layout->keys, &layout->values};
        for (const SideLayout* side : sides) {
            bytes = bytes && side->format == kInt8;
            words = words && side->scale_type != kNoScale &&
                    (side->format == kInt8 || side->format == kE4M3 || side->format == kCodes4);
        }
    }
    return bytes ? Numbers::kBytes : words ? Numbers::kWords : Numbers::kFloats;
}

int64_t scratch_bytes(const AttendCall& call, const Item& item) {
    switch (numbers_of(call)) {
        case Numbers::kBytes: return scratch_bytes_of<VnniMath>(call, item);
        case Numbers::kWords: return scratch_bytes_of<WordMath>(call, item);
        default: return scratch_bytes_of<FusedMath>(call, item);
    }
}

void run(const AttendCall& call, const Item& item, uint8_t* scratch) {
    switch (numbers_of(call)) {
        case Numbers::kBytes: return run_item<VnniMath>(call, item, scratch);
        case Numbers::kWords: return run_item<WordMath>(call, item, scratch);
        default: return run_item<FusedMath>(call, item, scratch);
    }
}

}  // namespace

const Kernels kAvx512Kernels = {scratch_bytes, run, merge_partials};

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
