// Attention for any CPU.

#include "attend_float.h"

namespace kvcfg {

using PortableMath = FloatMath<1, 2, PlainTranspose>;
const Kernels kPortableKernels = {scratch_bytes_of<PortableMath>, run_item<PortableMath>, merge_partials};

}  // namespace kvcfg
