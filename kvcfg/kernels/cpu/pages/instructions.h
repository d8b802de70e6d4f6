// Which instructions may be used: those of this CPU, or fewer if $KVCFG_CPU says avx2 or portable (for tests).

#pragma once

namespace kvcfg {

bool has_avx2();         // with FMA
bool has_avx512();       // F, BW, VL and DQ
bool has_avx512_vnni();  // and VNNI and VBMI

}  // namespace kvcfg
