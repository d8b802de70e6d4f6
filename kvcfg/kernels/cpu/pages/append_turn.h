// What a head's numbers are brought to before they are turned.

#pragma once

#include <cfloat>
#include <cstdint>

#include "append_numbers.h"
#include "turn.h"

namespace kvcfg {
namespace {

// What sums over a head keep finite; NaN stays.
inline void bound_for_turning(float* row, int64_t dim) {
    const float limit = float(double(FLT_MAX) / double(4 * dim));
    for (int64_t i = 0; i < dim; ++i) row[i] = bounded(row[i], limit);
}

}  // namespace
}  // namespace kvcfg
