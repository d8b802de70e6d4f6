// One number at a time: between float32 and the types that pages hold, rounded to nearest, ties to even.

#pragma once

#include <cfloat>
#include <cstdint>
#include <cstring>

#include "page_layout.h"

namespace kvcfg {
namespace {

inline uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

inline float magnitude(float number) { return float_of(bits_of(number) & 0x7FFFFFFF); }

// NaN stays.
inline float bounded(float number, float limit) {
    const float below = limit < number ? limit : number;
    return -limit > below ? -limit : below;
}

inline float from_bfloat16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bfloat16(float number) {
    const uint32_t bits = bits_of(number);
    return number != number ? 0xFFFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
    if (rest >= 0x7C00) return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400) return float_of(bits_of(float(rest) * 0x1p-24f) | sign);
    return float_of(sign | ((rest << 13) + (112u << 23)));
}

// The nearest number of a type with `mantissa` bits whose smallest normal exponent is `lowest` (biased as in
// float32), as its bits without a sign. Adding a power of two that is 23 - mantissa bits larger makes the CPU round.
inline uint32_t narrowed(float positive, int mantissa, uint32_t lowest) {
    const uint32_t own = bits_of(positive) & 0x7F800000, least = lowest << 23;
    const uint32_t exponent = own > least ? own : least;
    const uint32_t large = exponent + (uint32_t(23 - mantissa) << 23);
    return bits_of(positive + float_of(large)) - large + ((exponent - least) >> (23 - mantissa));
}

// For numbers within +-65504 and NaN.
inline uint16_t to_float16(float number) {
    const uint16_t sign = uint16_t(bits_of(number) >> 16 & 0x8000);
    if (number != number) return uint16_t(sign | 0x7E00 | (bits_of(number) >> 13 & 0x3FF));
    return uint16_t(sign | narrowed(magnitude(number), 10, 113));
}

inline uint8_t to_e4m3(float number) {
    const uint32_t code = narrowed(magnitude(number), 3, 121), sign = bits_of(number) >> 24 & 0x80;
    return uint8_t(sign | (number != number ? 0x7F : code));
}

inline uint8_t to_e5m2(float number) {
    const uint32_t code = narrowed(magnitude(number), 2, 113), sign = bits_of(number) >> 24 & 0x80;
    return uint8_t(sign | (number != number ? 0x7F : code));
}

// For numbers within +-127; NaN becomes 0.
inline int8_t to_int8(float number) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const int32_t whole = int32_t(bits_of(number + shift)) - int32_t(bits_of(shift));
    return int8_t(number != number ? 0 : whole);
}

inline int64_t size_of(int64_t format) {
    return format == kFloat32 ? 4 : format == kFloat16 || format == kBFloat16 ? 2 : 1;
}

inline int64_t scale_size(int64_t type) { return type == kNoScale ? 0 : type == kScaleFloat32 ? 4 : 2; }

inline float largest_number(int64_t format) {
    switch (format) {
        case kFloat32: return FLT_MAX;
        case kFloat16: return 65504.0f;
        case kBFloat16: return 0x1.FEp127f;
        case kE4M3: return 448.0f;
        case kE5M2: return 57344.0f;
        default: return 127.0f;
    }
}

// A scale as it is stored and will be read; `largest` is that of the elements it multiplies. The bound keeps a
// rounded scale times the largest element finite. One too small for its type becomes `of_zeros`.
inline float stored_scale(float exact, int64_t type, float largest, float of_zeros) {
    float bound = float(0.99 * double(FLT_MAX) / double(largest)), least = FLT_MIN;
    if (type == kScaleFloat16 && bound > 65504.0f) bound = 65504.0f;
    if (type == kScaleFloat16) least = 0x1p-24f;
    if (exact != exact) return type == kScaleBFloat16 ? from_bfloat16(0xFFFF) : float_of(0x7FC00000);
    float scale = exact > bound ? bound : exact;
    if (type == kScaleFloat16) scale = from_float16(to_float16(scale));
    if (type == kScaleBFloat16) scale = from_bfloat16(to_bfloat16(scale));
    return scale < least ? of_zeros : scale;
}

// Puts a number in a type of scales; for float16 within its range.
inline void put_scale(uint8_t* to, float scale, int64_t type) {
    if (type == kScaleFloat32) {
        memcpy(to, &scale, 4);
    } else {
        const uint16_t bits = type == kScaleFloat16 ? to_float16(scale) : to_bfloat16(scale);
        memcpy(to, &bits, 2);
    }
}

}  // namespace
}  // namespace kvcfg
