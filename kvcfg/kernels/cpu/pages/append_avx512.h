// Rows of numbers in AVX-512 registers: read from three types, turned, and cast. Include it under AVX-512 options,
// after append_numbers.h.

#pragma once

#include <immintrin.h>

namespace kvcfg {
namespace {

struct Pair {
    __m512 a, b;  // 32 numbers, in whatever order suits their source
};

inline __mmask32 lanes_left(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1; }
inline __mmask16 lanes_left16(int64_t count) { return __mmask16(count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1); }

// The low halves of the 32 lanes of two vectors, in order.
inline __m512i low_words(__m512i a, __m512i b) {
    alignas(64) static const uint16_t even[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                  32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(even), b);
}

inline int largest_word(__m512i words) {
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(words), _mm512_extracti64x4_epi64(words, 1));
    const __m128i quarter = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return 0xFFFF ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(quarter, _mm_set1_epi16(-1)))) & 0xFFFF);
}

// What is common to the types of 16 bits. Magnitudes are ordered as their bits, and NaN comes last.
struct Source16 {
    using Raw = __m512i;
    static constexpr int64_t size = 2;

    static Raw load(const uint8_t* numbers, int64_t i, __mmask32 mask) {
        return _mm512_maskz_loadu_epi16(mask, numbers + 2 * i);
    }
    static Raw magnitudes(Raw raw) { return _mm512_and_si512(raw, _mm512_set1_epi16(0x7FFF)); }
    static __m512i signs(Raw raw) { return _mm512_and_si512(_mm512_srli_epi16(raw, 8), _mm512_set1_epi16(0x80)); }
    static __m512i larger(__m512i most, Raw raw) { return _mm512_max_epu16(most, magnitudes(raw)); }
};

struct BFloat16Source : Source16 {
    static Pair floats(Raw raw) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(int(0xFFFF0000))))};
    }
    static __m512i words(__m512i a, __m512i b) {
        return _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
    }
    static float largest(__m512i most) { return from_bfloat16(uint16_t(largest_word(most))); }
    static __m512 sixteen(const uint8_t* numbers, int64_t i, __mmask16 mask) {
        const __m256i words = _mm256_maskz_loadu_epi16(mask, numbers + 2 * i);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    }
};

struct Float16Source : Source16 {
    static Pair floats(Raw raw) {
        return {_mm512_cvtph_ps(_mm512_castsi512_si256(raw)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1))};
    }
    static __m512i words(__m512i a, __m512i b) { return low_words(a, b); }
    static float largest(__m512i most) { return from_float16(uint16_t(largest_word(most))); }
    static __m512 sixteen(const uint8_t* numbers, int64_t i, __mmask16 mask) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, numbers + 2 * i));
    }
};

struct Float32Source {
    using Raw = Pair;
    static constexpr int64_t size = 4;

    static Raw load(const uint8_t* numbers, int64_t i, __mmask32 mask) {
        return {_mm512_maskz_loadu_ps(__mmask16(mask), numbers + 4 * i),
                _mm512_maskz_loadu_ps(__mmask16(mask >> 16), numbers + 4 * i + 64)};
    }
    static Pair floats(Raw raw) { return raw; }
    static Raw magnitudes(Raw raw) { return {_mm512_abs_ps(raw.a), _mm512_abs_ps(raw.b)}; }
    static __m512i signs(Raw raw) {
        const __m512i words = low_words(_mm512_srli_epi32(_mm512_castps_si512(raw.a), 24),
                                        _mm512_srli_epi32(_mm512_castps_si512(raw.b), 24));
        return _mm512_and_si512(words, _mm512_set1_epi16(0x80));
    }
    static __m512i words(__m512i a, __m512i b) { return low_words(a, b); }
    static __m512i larger(__m512i most, Raw raw) {
        const Raw own = magnitudes(raw);
        return _mm512_max_epu32(_mm512_max_epu32(most, _mm512_castps_si512(own.a)), _mm512_castps_si512(own.b));
    }
    static float largest(__m512i most) { return float_of(_mm512_reduce_max_epu32(most)); }
    static __m512 sixteen(const uint8_t* numbers, int64_t i, __mmask16 mask) {
        return _mm512_maskz_loadu_ps(mask, numbers + 4 * i);
    }
};

// Rows have room up to the next multiple of 16, which is filled with zeros.
template <class Source>
inline void read_row(const uint8_t* numbers, int64_t dim, float* row) {
    for (int64_t i = 0; i < dim; i += 16) _mm512_store_ps(row + i, Source::sixteen(numbers, i, lanes_left16(dim - i)));
}

// One stage of the Hadamard transform: sums and differences of lanes that are 1 << Stage apart.
template <int Stage>
inline __attribute__((always_inline)) __m512 within_lanes(__m512 numbers) {
    constexpr int second = Stage == 0 ? 0xAAAA : Stage == 1 ? 0xCCCC : Stage == 2 ? 0xF0F0 : 0xFF00;
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 signs = _mm512_mask_sub_ps(one, second, _mm512_setzero_ps(), one);
    const __m512 other = Stage == 0   ? _mm512_permute_ps(numbers, 0xB1)
                         : Stage == 1 ? _mm512_permute_ps(numbers, 0x4E)
                         : Stage == 2 ? _mm512_shuffle_f32x4(numbers, numbers, 0xB1)
                                      : _mm512_shuffle_f32x4(numbers, numbers, 0x4E);
    return _mm512_fmadd_ps(numbers, signs, other);
}

// Turns `Vectors` times 16 numbers, a power of two, in registers.
template <int Vectors>
inline __attribute__((always_inline)) void turn_vectors(__m512 (&numbers)[Vectors], __m512 factor) {
    for (int i = 0; i < Vectors; ++i) {
        numbers[i] = within_lanes<3>(within_lanes<2>(within_lanes<1>(within_lanes<0>(numbers[i]))));
        numbers[i] = _mm512_mul_ps(numbers[i], factor);
    }
    for (int half = 1; half < Vectors; half *= 2) {
        for (int i = 0; i < Vectors; ++i) {
            if (i & half) continue;
            const __m512 first = numbers[i], second = numbers[i + half];
            numbers[i] = _mm512_add_ps(first, second);
            numbers[i + half] = _mm512_sub_ps(first, second);
        }
    }
}

template <int Vectors>
inline void turn_runs(float* row, int64_t dim, __m512 factor) {
    for (int64_t begin = 0; begin < dim; begin += 16 * Vectors) {
        __m512 numbers[Vectors];
        for (int i = 0; i < Vectors; ++i) numbers[i] = _mm512_load_ps(row + begin + 16 * i);
        turn_vectors(numbers, factor);
        for (int i = 0; i < Vectors; ++i) _mm512_store_ps(row + begin + 16 * i, numbers[i]);
    }
}

// `turn` of append_turn.h for an aligned row with room up to the next multiple of 16.
inline void turn_avx512(float* row, int64_t dim) {
    const int64_t width = dim & -dim, run = width < 128 ? width : 128;
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(float(width)));
    switch (run) {
        case 128: turn_runs<8>(row, dim, factor); break;
        case 64: turn_runs<4>(row, dim, factor); break;
        case 32: turn_runs<2>(row, dim, factor); break;
        case 16: turn_runs<1>(row, dim, factor); break;
        default:
            for (int64_t i = 0; i < dim; i += 16) {
                __m512 numbers = _mm512_load_ps(row + i);
                if (width > 1) numbers = within_lanes<0>(numbers);
                if (width > 2) numbers = within_lanes<1>(numbers);
                if (width > 4) numbers = within_lanes<2>(numbers);
                _mm512_store_ps(row + i, _mm512_mul_ps(numbers, factor));
            }
    }
    for (int64_t half = run; half < width; half *= 2) {
        for (int64_t begin = 0; begin < dim; begin += 2 * half) {
            for (int64_t i = begin; i < begin + half; i += 16) {
                const __m512 first = _mm512_load_ps(row + i), second = _mm512_load_ps(row + i + half);
                _mm512_store_ps(row + i, _mm512_add_ps(first, second));
                _mm512_store_ps(row + i + half, _mm512_sub_ps(first, second));
            }
        }
    }
}

// The numbers of a head turned, bounded first so that sums are finite; NaN stays.
template <class Source>
inline void turned_row(const uint8_t* numbers, int64_t dim, float* row) {
    const __m512 limit = _mm512_set1_ps(float(double(FLT_MAX) / double(4 * dim)));
    const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), limit);
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 number = Source::sixteen(numbers, i, lanes_left16(dim - i));
        _mm512_store_ps(row + i, _mm512_min_ps(limit, _mm512_max_ps(least, number)));
    }
    turn_avx512(row, dim);
}

// Numbers in a float type, kept within its range if `bound`; NaN stays.
inline void write_cast_avx512(const float* row, int64_t dim, int64_t format, bool bound, uint8_t* to) {
    const __m512 limit = _mm512_set1_ps(bound ? largest_number(format) : INFINITY);
    const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), limit);
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 mask = lanes_left16(dim - i);
        const __m512 number = _mm512_min_ps(limit, _mm512_max_ps(least, _mm512_load_ps(row + i)));
        if (format == kFloat32) {
            _mm512_mask_storeu_ps(to + 4 * i, mask, number);
        } else if (format == kFloat16) {
            const __m256i halves = _mm512_cvtps_ph(number, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            _mm256_mask_storeu_epi16(to + 2 * i, mask, halves);
        } else {
            const __m512i bits = _mm512_castps_si512(number);
            const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i rounded =
                _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
            const __mmask16 nan = _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q);
            const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0xFFFF));
            _mm256_mask_storeu_epi16(to + 2 * i, mask, _mm512_cvtepi32_epi16(words));
        }
    }
}

// `stored_scale` of append_numbers.h for sixteen scales.
inline __m512 stored_scales(__m512 exact, int64_t type, float largest, float of_zeros) {
    const bool half = type == kScaleFloat16;
    const double most = 0.99 * double(FLT_MAX) / double(largest);
    const __m512 bound = _mm512_set1_ps(half && most > 65504.0 ? 65504.0f : float(most));
    __m512 scales = _mm512_min_ps(bound, exact);
    __m512i nan = _mm512_set1_epi32(0x7FC00000);
    if (half) {
        scales = _mm512_cvtph_ps(_mm512_cvtps_ph(scales, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else if (type == kScaleBFloat16) {
        const __m512i bits = _mm512_castps_si512(scales);
        const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
        scales = _mm512_castsi512_ps(_mm512_and_epi32(sum, _mm512_set1_epi32(int(0xFFFF0000))));
        nan = _mm512_set1_epi32(int(0xFFFF0000));
    }
    const __m512 least = _mm512_set1_ps(half ? 0x1p-24f : FLT_MIN);
    const __mmask16 small = _mm512_cmp_ps_mask(scales, least, _CMP_LT_OQ);
    const __mmask16 unordered = _mm512_cmp_ps_mask(exact, exact, _CMP_UNORD_Q);
    scales = _mm512_mask_mov_ps(scales, small, _mm512_set1_ps(of_zeros));
    return _mm512_mask_mov_ps(scales, unordered, _mm512_castsi512_ps(nan));
}

// Puts a scale that has the precision of its type already.
inline void put_stored(uint8_t* to, float scale, int64_t type) {
    if (type == kScaleFloat32) {
        memcpy(to, &scale, 4);
    } else {
        const __m128i half = _mm_cvtps_ph(_mm_set_ss(scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const uint16_t bits = type == kScaleFloat16 ? uint16_t(_mm_cvtsi128_si32(half)) : uint16_t(bits_of(scale) >> 16);
        memcpy(to, &bits, 2);
    }
}

}  // namespace
}  // namespace kvcfg
