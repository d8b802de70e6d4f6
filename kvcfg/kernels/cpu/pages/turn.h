// The Hadamard transform of a head, in runs of the largest power of two that divides its width.

#pragma once

#include <cstdint>

namespace kvcfg {
namespace {

// Turns [dim] numbers; turning them again undoes it.
inline void turn(float* row, int64_t dim) {
    const int64_t width = dim & -dim;
    for (int64_t half = 1; half < width; half *= 2) {
        for (int64_t begin = 0; begin < dim; begin += 2 * half) {
            for (int64_t i = begin; i < begin + half; ++i) {
                const float first = row[i], second = row[i + half];
                row[i] = first + second;
                row[i + half] = first - second;
            }
        }
    }
    const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(width));
    for (int64_t i = 0; i < dim; ++i) row[i] *= factor;
}

}  // namespace
}  // namespace kvcfg
