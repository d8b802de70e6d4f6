#include "instructions.h"

#include <cstdlib>

namespace kvcfg {

#if defined(__x86_64__)

namespace {

enum Allowed { kPortable, kAvx2, kAll };

Allowed allowed() {
    const char* asked = std::getenv("KVCFG_CPU");
    if (asked == nullptr) return kAll;
    return asked[0] == 'p' ? kPortable : asked[0] == 'a' ? kAvx2 : kAll;
}

}  // namespace

bool has_avx2() noexcept {
    return allowed() >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() noexcept {
    return allowed() == kAll && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}

bool has_avx512_vnni() noexcept {
    return has_avx512() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512_bf16() noexcept { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

#else

bool has_avx2() noexcept { return false; }
bool has_avx512() noexcept { return false; }
bool has_avx512_vnni() noexcept { return false; }
bool has_avx512_bf16() noexcept { return false; }

#endif

}  // namespace kvcfg
