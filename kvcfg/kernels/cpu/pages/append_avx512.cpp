// Encodes tokens with AVX-512, 32 numbers at a time; the same bytes as plain code.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "append.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "append_numbers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "append_avx512.h"

namespace kvcfg {
namespace {

#define KVCFG_INLINE inline __attribute__((always_inline))

// Elements of 8 bits, made of numbers that are divided by their scale already.

struct Int8Elements {
    static constexpr int64_t format = kInt8;

    static KVCFG_INLINE __m512i codes(__m512 quotients) { return _mm512_cvtps_epi32(quotients); }

    static KVCFG_INLINE __m512i any_codes(__m512 quotients) {
        const __mmask16 ordered = _mm512_cmp_ps_mask(quotients, quotients, _CMP_ORD_Q);
        const __m512 low = _mm512_max_ps(quotients, _mm512_set1_ps(-127.0f));
        return _mm512_maskz_cvtps_epi32(ordered, _mm512_min_ps(low, _mm512_set1_ps(127.0f)));
    }

    static KVCFG_INLINE __m256i bytes(__m512i words) {
        return _mm256_max_epi8(_mm512_cvtsepi16_epi8(words), _mm256_set1_epi8(-127));
    }
};

// See `narrowed` of append_numbers.h.
template <int64_t Format, int Mantissa, int Lowest>
struct FloatElements {
    static constexpr int64_t format = Format;

    static KVCFG_INLINE __m512i codes(__m512 magnitudes) {
        constexpr int shift = 23 - Mantissa;
        const __m512i own = _mm512_and_epi32(_mm512_castps_si512(magnitudes), _mm512_set1_epi32(0x7F800000));
        const __m512i exponent = _mm512_max_epi32(own, _mm512_set1_epi32(Lowest << 23));
        const __m512i large = _mm512_add_epi32(exponent, _mm512_set1_epi32(shift << 23));
        const __m512i sum = _mm512_castps_si512(_mm512_add_ps(magnitudes, _mm512_castsi512_ps(large)));
        const __m512i steps = _mm512_sub_epi32(_mm512_srli_epi32(exponent, shift), _mm512_set1_epi32(Lowest << Mantissa));
        return _mm512_add_epi32(_mm512_sub_epi32(sum, large), steps);
    }

    static KVCFG_INLINE __m512i any_codes(__m512 quotients) {
        const __mmask16 nan = _mm512_cmp_ps_mask(quotients, quotients, _CMP_UNORD_Q);
        const __m512 limit = _mm512_set1_ps(Format == kE4M3 ? 448.0f : 57344.0f);
        const __m512i magnitudes = codes(_mm512_min_ps(_mm512_abs_ps(quotients), limit));
        const __m512i sign = _mm512_and_epi32(_mm512_srli_epi32(_mm512_castps_si512(quotients), 24), _mm512_set1_epi32(0x80));
        return _mm512_or_epi32(_mm512_mask_mov_epi32(magnitudes, nan, _mm512_set1_epi32(0x7F)), sign);
    }

    static KVCFG_INLINE __m256i bytes(__m512i words) { return _mm512_cvtepi16_epi8(words); }
};

using E4M3Elements = FloatElements<kE4M3, 3, 121>;
using E5M2Elements = FloatElements<kE5M2, 2, 113>;

// A scale, and 1 / scale as a sum of two numbers.
struct Divisor {
    __m512 scale, high, low;

    // The correctly rounded quotient (Markstein 1990: one step from a quotient within one unit in the last place), in
    // less than half the time of a division. Right for scales from 2^-60 to 2^60; a quotient below 2^-40 may be off,
    // which no format of 8 bits can tell from 0.
    KVCFG_INLINE __m512 quotients(__m512 numbers) const {
        const __m512 near = _mm512_fmadd_ps(numbers, high, _mm512_mul_ps(numbers, low));
        return _mm512_fmadd_ps(_mm512_fnmadd_ps(near, scale, numbers), high, near);
    }
};

template <class Source, class Elements>
KVCFG_INLINE __m256i encoded_within(typename Source::Raw raw, const Divisor& divisor) {
    if constexpr (Elements::format == kInt8) {
        const Pair pair = Source::floats(raw);
        const __m512i a = Elements::codes(divisor.quotients(pair.a)), b = Elements::codes(divisor.quotients(pair.b));
        return Elements::bytes(Source::words(a, b));
    } else {
        const Pair pair = Source::floats(Source::magnitudes(raw));
        const __m512i a = Elements::codes(divisor.quotients(pair.a)), b = Elements::codes(divisor.quotients(pair.b));
        return Elements::bytes(_mm512_or_si512(Source::words(a, b), Source::signs(raw)));
    }
}

// Only for quotients that need no bound, and no NaN.
template <class Source, class Elements>
KVCFG_INLINE void encode_within(const uint8_t* numbers, int64_t dim, const Divisor& divisor, uint8_t* to) {
    int64_t i = 0;
    for (; i + 32 <= dim; i += 32) {  // stores under a mask are slow
        const __m256i bytes = encoded_within<Source, Elements>(Source::load(numbers, i, ~0u), divisor);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), bytes);
    }
    if (i < dim) {
        const __mmask32 mask = lanes_left(dim - i);
        _mm256_mask_storeu_epi8(to + i, mask, encoded_within<Source, Elements>(Source::load(numbers, i, mask), divisor));
    }
}

// For any numbers; returns how many are beyond the range.
template <class Source, class Elements>
int64_t encode_any(const uint8_t* numbers, int64_t dim, float scale, uint8_t* to) {
    const __m512 divisor = _mm512_set1_ps(scale), limit = _mm512_set1_ps(largest_number(Elements::format));
    int64_t beyond = 0;
    for (int64_t i = 0; i < dim; i += 32) {
        const __mmask32 mask = lanes_left(dim - i);
        Pair pair = Source::floats(Source::load(numbers, i, mask));
        if (scale != 1.0f) pair = {_mm512_div_ps(pair.a, divisor), _mm512_div_ps(pair.b, divisor)};
        beyond += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(pair.a), limit, _CMP_GT_OQ));
        beyond += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_abs_ps(pair.b), limit, _CMP_GT_OQ));
        const __m512i words = Source::words(Elements::any_codes(pair.a), Elements::any_codes(pair.b));
        if (mask == ~0u) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), Elements::bytes(words));
        } else {
            _mm256_mask_storeu_epi8(to + i, mask, Elements::bytes(words));
        }
    }
    return beyond;
}

template <class Source>
KVCFG_INLINE float largest_magnitude(const uint8_t* numbers, int64_t dim) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = 0; i < dim; i += 32) most = Source::larger(most, Source::load(numbers, i, lanes_left(dim - i)));
    return Source::largest(most);
}

// Sixteen heads, of any tokens, at a time: their scales are made together.
template <class Source, class Elements>
struct ScaledRows {
    const int64_t dim, type;
    int count = 0;
    const uint8_t* from[16];
    uint8_t *to[16], *scale_to[16];
    alignas(64) float most[16], scale[16], high[16], low[16];

    explicit ScaledRows(const SideLayout& layout) : dim(layout.dim), type(layout.scale_type) {}

    KVCFG_INLINE void add(const uint8_t* numbers, uint8_t* elements, uint8_t* scales) {
        from[count] = numbers;
        to[count] = elements;
        scale_to[count] = scales;
        most[count++] = largest_magnitude<Source>(numbers, dim);
    }

    KVCFG_INLINE void encode() {
        const float largest = largest_number(Elements::format);
        const __m512 exact = _mm512_div_ps(_mm512_load_ps(most), _mm512_set1_ps(largest));
        const __m512 scales = stored_scales(exact, type, largest, 1.0f), one = _mm512_set1_ps(1.0f);
        const __m512 first = _mm512_div_ps(one, scales);
        _mm512_store_ps(scale, scales);
        _mm512_store_ps(high, first);
        _mm512_store_ps(low, _mm512_mul_ps(_mm512_fnmadd_ps(first, scales, one), first));
        // A scale of float16 that is no normal number can be so far from the exact one that quotients need a bound.
        const int within = _mm512_cmp_ps_mask(scales, _mm512_set1_ps(0x1p-60f), _CMP_GE_OQ) &
                           _mm512_cmp_ps_mask(scales, _mm512_set1_ps(0x1p60f), _CMP_LE_OQ) &
                           _mm512_cmp_ps_mask(exact, _mm512_mul_ps(scales, _mm512_set1_ps(1.01f)), _CMP_LE_OQ);
        for (int i = 0; i < count; ++i) {
            put_stored(scale_to[i], scale[i], type);
            if (within >> i & 1) {
                const Divisor divisor{_mm512_set1_ps(scale[i]), _mm512_set1_ps(high[i]), _mm512_set1_ps(low[i])};
                encode_within<Source, Elements>(from[i], dim, divisor, to[i]);
            } else {
                encode_any<Source, Elements>(from[i], dim, scale[i], to[i]);
            }
        }
        count = 0;
    }
};

template <class Source, class Elements>
int64_t encode_scaled(const TokenSide& side, const TokenPlace* places, int64_t count) {
    const SideLayout& layout = *side.layout;
    ScaledRows<Source, Elements> rows(layout);
    const int64_t size = scale_size(rows.type);
    for (int64_t token = 0; token < count; ++token) {
        const TokenPlace& place = places[token];
        for (int64_t head = 0; head < side.n_heads; ++head) {
            rows.add(place.numbers + head * side.head_bytes, place.elements + head * layout.head_bytes,
                     place.scales + head * size);
            if (rows.count == 16) rows.encode();
        }
    }
    if (rows.count) rows.encode();
    return 0;
}

template <class Source, class Elements>
int64_t encode_turned(const TokenSide& side, const TokenPlace* places, int64_t count) {
    const SideLayout& layout = *side.layout;
    ScaledRows<Float32Source, Elements> rows(layout);
    const int64_t size = scale_size(rows.type), room = (layout.dim + 15) / 16 * 16;
    alignas(64) float turned[16 * kMostNumbers];
    for (int64_t token = 0; token < count; ++token) {
        const TokenPlace& place = places[token];
        for (int64_t head = 0; head < side.n_heads; ++head) {
            float* row = turned + rows.count * room;
            turned_row<Source>(place.numbers + head * side.head_bytes, layout.dim, row);
            rows.add(reinterpret_cast<uint8_t*>(row), place.elements + head * layout.head_bytes,
                     place.scales + head * size);
            if (rows.count == 16) rows.encode();
        }
    }
    if (rows.count) rows.encode();
    return 0;
}

// Where scales are not stored: they are 1, or calibrated.
template <class Source, class Elements>
int64_t encode_fixed(const TokenSide& side, const TokenPlace* places, int64_t count) {
    const SideLayout& layout = *side.layout;
    const int64_t dim = layout.dim;
    alignas(64) float row[kMostNumbers];
    int64_t beyond = 0;
    for (int64_t token = 0; token < count; ++token) {
        for (int64_t head = 0; head < side.n_heads; ++head) {
            const uint8_t* from = places[token].numbers + head * side.head_bytes;
            uint8_t* to = places[token].elements + head * layout.head_bytes;
            const float scale = side.head_scales ? side.head_scales[head] : 1.0f;
            if (side.turned) {
                turned_row<Source>(from, dim, row);
                beyond += encode_any<Float32Source, Elements>(reinterpret_cast<uint8_t*>(row), dim, scale, to);
            } else {
                beyond += encode_any<Source, Elements>(from, dim, scale, to);
            }
        }
    }
    return beyond;
}

template <class Source>
int64_t cast_tokens(const TokenSide& side, const TokenPlace* places, int64_t count) {
    const SideLayout& layout = *side.layout;
    const int64_t dim = layout.dim, bytes = dim * size_of(layout.format);
    const bool as_is = layout.format == side.number_type && !side.turned;
    alignas(64) float row[kMostNumbers];
    for (int64_t token = 0; token < count; ++token) {
        const TokenPlace& place = places[token];
        if (as_is && side.head_bytes == bytes && layout.head_bytes == bytes) {
            memcpy(place.elements, place.numbers, size_t(side.n_heads * bytes));
            continue;
        }
        for (int64_t head = 0; head < side.n_heads; ++head) {
            const uint8_t* from = place.numbers + head * side.head_bytes;
            uint8_t* to = place.elements + head * layout.head_bytes;
            if (as_is) {
                memcpy(to, from, size_t(bytes));
            } else if (side.turned) {
                turned_row<Source>(from, dim, row);
                write_cast_avx512(row, dim, layout.format, layout.format != kFloat32, to);
            } else {
                read_row<Source>(from, dim, row);
                write_cast_avx512(row, dim, layout.format, true, to);
            }
        }
    }
    return 0;
}

template <class Source, class Elements>
EncodeTokens scaled_encoder(const TokenSide& side) {
    if (side.layout->scale_type == kNoScale) return encode_fixed<Source, Elements>;
    return side.turned ? encode_turned<Source, Elements> : encode_scaled<Source, Elements>;
}

template <class Source>
EncodeTokens encoder_of(const TokenSide& side) {
    switch (side.layout->format) {
        case kInt8: return scaled_encoder<Source, Int8Elements>(side);
        case kE4M3: return scaled_encoder<Source, E4M3Elements>(side);
        case kE5M2: return scaled_encoder<Source, E5M2Elements>(side);
        case kFloat32: case kFloat16: case kBFloat16: return cast_tokens<Source>;
        default: return nullptr;
    }
}

}  // namespace

EncodeTokens avx512_encoder(const TokenSide& side) {
    if (side.layout->dim > kMostNumbers) return nullptr;
    switch (side.number_type) {
        case kFloat32: return encoder_of<Float32Source>(side);
        case kFloat16: return encoder_of<Float16Source>(side);
        case kBFloat16: return encoder_of<BFloat16Source>(side);
        default: return nullptr;
    }
}

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace kvcfg {
EncodeTokens avx512_encoder(const TokenSide&) { return nullptr; }
}  // namespace kvcfg

#endif
