// Which instructions may be used: those of this CPU, or fewer if $KVCFG_CPU says avx2 or portable (for tests).

#pragma once

namespace kvcfg {

bool has_avx2() noexcept;         // with FMA
bool has_avx512() noexcept;       // F, BW, VL and DQ
bool has_avx512_vnni() noexcept;  // and VNNI and VBMI
bool has_avx512_bf16() noexcept;  // and BF16

}  // namespace kvcfg
