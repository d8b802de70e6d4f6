// Attention for CPUs with AVX-512 and its dot products of whole numbers (VNNI).
//
//     int8 pages                                        products of bytes
//     bfloat16, 8-bit floats, 4-bit codes, and int8     products of bfloat16, where the CPU has them
//       beside these
//     all others                                        float32

#if defined(__x86_64__)
#include <type_traits>

#include "attend.h"
#include "instructions.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512bf16,avx2,fma,f16c")
#endif

#include "attend_fused.h"
#include "attend_pairs.h"
#include "attend_vnni.h"

namespace kvcfg {
namespace {

enum class Numbers { kBytes, kPairs, kPairsOfDigits, kFloats };

Numbers numbers_of(const AttendCall& call) {
    static const bool has_pairs = has_avx512_bf16();
    bool bytes = true, pairs = has_pairs;
    const PageLayout* layouts[] = {call.layout, call.open_pages == nullptr ? call.layout : call.open_layout};
    for (const PageLayout* layout : layouts) {
        const SideLayout* sides[] = {&layout->keys, &layout->values};
        for (const SideLayout* side : sides) {
            bytes = bytes && side->format == kInt8;
            pairs = pairs && PairMath<1>::reads(side->format);
        }
    }
    if (bytes) return Numbers::kBytes;
    if (!pairs) return Numbers::kFloats;
    // Codes with zeros are not negative: what rounding does to their sum is not small beside it once the zeros are added.
    const bool has_zeros = call.layout->keys.zeros >= 0 || call.layout->values.zeros >= 0;
    return call.query_type == kBFloat16 && !has_zeros ? Numbers::kPairs : Numbers::kPairsOfDigits;
}

int64_t scratch_bytes(const AttendCall& call, const Item& item) {
    switch (numbers_of(call)) {
        case Numbers::kBytes: return scratch_bytes_of<VnniMath>(call, item);
        case Numbers::kPairs: return scratch_bytes_of<PairMath<1>>(call, item);
        case Numbers::kPairsOfDigits: return scratch_bytes_of<PairMath<2>>(call, item);
        default: return scratch_bytes_of<FusedMath>(call, item);
    }
}

void run(const AttendCall& call, const Item& item, uint8_t* scratch) {
    switch (numbers_of(call)) {
        case Numbers::kBytes: return run_item<VnniMath>(call, item, scratch);
        case Numbers::kPairs: return run_item<PairMath<1>>(call, item, scratch);
        case Numbers::kPairsOfDigits: return run_item<PairMath<2>>(call, item, scratch);
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
