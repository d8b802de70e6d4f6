// Sixteen numbers at a time, in the vector extension of GCC and Clang: the compiler makes of them what the
// instruction set of the including file has. Include it after the pragma that chooses one.

#pragma once

#include <cstdint>
#include <cstring>

namespace kvcfg {
namespace {

typedef float Floats __attribute__((vector_size(64), aligned(64)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(64)));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(32)));
typedef uint8_t Bytes __attribute__((vector_size(16), aligned(16)));

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896340736f;

#define KVCFG_INLINE inline __attribute__((always_inline))
#define KVCFG_UNROLL _Pragma("GCC unroll 16")  // what is indexed by a loop of fixed length can then be a register

template <class Vector>
KVCFG_INLINE Vector load(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof(Vector));
    return vector;
}

template <class Vector>
KVCFG_INLINE void store(void* to, Vector vector) {
    memcpy(to, &vector, sizeof(Vector));
}

KVCFG_INLINE Floats all(float number) { return Floats{} + number; }
KVCFG_INLINE Ints all_ints(int32_t number) { return Ints{} + number; }
KVCFG_INLINE Floats as_floats(Ints bits) { return (Floats)bits; }
KVCFG_INLINE Ints as_ints(Floats bits) { return (Ints)bits; }

// The larger one; `other` where `number` is NaN.
KVCFG_INLINE Floats larger(Floats number, Floats other) { return number > other ? number : other; }

typedef float HalfFloats __attribute__((vector_size(32), aligned(32)));
typedef float QuarterFloats __attribute__((vector_size(16), aligned(16)));

KVCFG_INLINE float sum(Floats numbers) {
    HalfFloats halves[2];
    QuarterFloats quarters[2];
    memcpy(halves, &numbers, sizeof halves);
    const HalfFloats half = halves[0] + halves[1];
    memcpy(quarters, &half, sizeof quarters);
    const QuarterFloats quarter = quarters[0] + quarters[1];
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

KVCFG_INLINE float largest(Floats numbers) {
    HalfFloats halves[2];
    QuarterFloats quarters[2];
    memcpy(halves, &numbers, sizeof halves);
    const HalfFloats half = halves[0] > halves[1] ? halves[0] : halves[1];
    memcpy(quarters, &half, sizeof quarters);
    const QuarterFloats quarter = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
    const float low = quarter[0] > quarter[1] ? quarter[0] : quarter[1];
    const float high = quarter[2] > quarter[3] ? quarter[2] : quarter[3];
    return low > high ? low : high;
}

// 2^x for x of at most 127, relative error 2e-7; 0 below 2^-126, NaN of NaN. The polynomial interpolates 2^x in the
// Chebyshev points of -1/2 … 1/2.
KVCFG_INLINE Floats exp2_of(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats bounded = x < -127.0f ? all(-127.0f) : x;
    const Floats whole = bounded + shift;
    const Floats rest = bounded - (whole - shift);
    Floats power = all(1.339086337e-3f);
    power = power * rest + 9.676031918e-3f;
    power = power * rest + 5.550357114e-2f;
    power = power * rest + 2.402210749e-1f;
    power = power * rest + 6.931471880e-1f;
    power = power * rest + 1.000000075f;
    const Floats scaled = as_floats(as_ints(power) + (as_ints(whole) << 23));
    return x < -126.0f ? all(0.0f) : (x == x ? scaled : x);
}

KVCFG_INLINE Floats tanh_of(Floats x) {
    const Floats bounded = x > 20.0f ? all(20.0f) : (x < -20.0f ? all(-20.0f) : x);
    return 1.0f - 2.0f / (exp2_of(bounded * (2.0f * kLog2E)) + 1.0f);
}

KVCFG_INLINE Floats from_bfloat16(Halves bits) {
    return as_floats(__builtin_convertvector(bits, Ints) << 16);
}

// A float16's exponent and mantissa, shifted to where a float32 has them, are 2^112 times too small.
KVCFG_INLINE Floats from_float16(Halves bits) {
    const Ints wide = __builtin_convertvector(bits, Ints);
    const Ints magnitude = (wide & 0x7fff) << 13;
    const Ints special = (wide & 0x7c00) == 0x7c00 ? all_ints(0x7f800000) : all_ints(0);
    const Floats scaled = as_floats(magnitude) * 5.192296858534828e33f;
    return as_floats(as_ints(scaled) | special | ((wide & 0x8000) << 16));
}

// Likewise 2^120 for e4m3, which has a NaN and no infinity.
KVCFG_INLINE Floats from_e4m3(Bytes bits) {
    const Ints wide = __builtin_convertvector(bits, Ints);
    const Ints magnitude = (wide & 0x7f) << 20;
    const Ints special = (wide & 0x7f) == 0x7f ? all_ints(0x7fc00000) : all_ints(0);
    const Floats scaled = as_floats(magnitude) * 1.329227995784916e36f;
    return as_floats(as_ints(scaled) | special | ((wide & 0x80) << 24));
}

KVCFG_INLINE Floats from_e5m2(Bytes bits) {
    return from_float16(__builtin_convertvector(bits, Halves) << 8);
}

KVCFG_INLINE Floats from_int8(Bytes bits) {
    const Ints wide = __builtin_convertvector(bits, Ints);
    return __builtin_convertvector((wide << 24) >> 24, Floats);
}

// To nearest, ties to even; a NaN stays one.
KVCFG_INLINE uint16_t to_bfloat16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if (number != number) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
}  // namespace kvcfg
