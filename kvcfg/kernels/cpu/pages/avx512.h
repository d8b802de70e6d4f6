// Sixteen 32-bit units at a time with AVX-512: loading stored rows, and putting them in the order that dot products of
// 4 bytes or 2 bfloat16 take. Include after the pragma that chooses the instruction set.

#pragma once

#include <immintrin.h>

#include "lanes.h"
#include "page_layout.h"

namespace kvcfg {
namespace {

// Rows of 16 units to columns.
KVCFG_INLINE void transpose(__m512i* rows) {
    __m512i pairs[16];
    KVCFG_UNROLL
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    KVCFG_UNROLL
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    KVCFG_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512i a = rows[i], b = rows[i + 4], c = rows[i + 8], d = rows[i + 12];
        const __m512i low_ab = _mm512_shuffle_i32x4(a, b, 0x88), high_ab = _mm512_shuffle_i32x4(a, b, 0xdd);
        const __m512i low_cd = _mm512_shuffle_i32x4(c, d, 0x88), high_cd = _mm512_shuffle_i32x4(c, d, 0xdd);
        rows[i] = _mm512_shuffle_i32x4(low_ab, low_cd, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(low_ab, low_cd, 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(high_ab, high_cd, 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(high_ab, high_cd, 0xdd);
    }
}

// The sums of 16 vectors, one a lane: pairs of lanes are added as vectors are merged.
template <class Vector, class Add>
KVCFG_INLINE Vector sums_of(Vector* vectors, const Add& add) {
    const auto bits = [](Vector vector) { return (__m512i)vector; };
    Vector halves[8], quarters[4], eighths[2];
    KVCFG_UNROLL
    for (int i = 0; i < 8; ++i) {
        const int first = i < 4 ? i : i + 4;
        const __m512i a = bits(vectors[first]), b = bits(vectors[first + 4]);
        halves[i] = add((Vector)_mm512_shuffle_i32x4(a, b, 0x44), (Vector)_mm512_shuffle_i32x4(a, b, 0xee));
    }
    KVCFG_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512i a = bits(halves[i]), b = bits(halves[i + 4]);
        quarters[i] = add((Vector)_mm512_shuffle_i32x4(a, b, 0x88), (Vector)_mm512_shuffle_i32x4(a, b, 0xdd));
    }
    KVCFG_UNROLL
    for (int i = 0; i < 2; ++i) {
        const __m512i a = bits(quarters[i]), b = bits(quarters[i + 2]);
        eighths[i] = add((Vector)_mm512_unpacklo_epi64(a, b), (Vector)_mm512_unpackhi_epi64(a, b));
    }
    const __m512i a = _mm512_shuffle_epi32(bits(eighths[0]), _MM_PERM_DBCA);
    const __m512i b = _mm512_shuffle_epi32(bits(eighths[1]), _MM_PERM_DBCA);
    return add((Vector)_mm512_unpacklo_epi32(a, b), (Vector)_mm512_unpackhi_epi32(a, b));
}

KVCFG_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << (count > 0 ? count : 0)) - 1; }
KVCFG_INLINE __mmask32 first_words(int64_t count) { return count >= 32 ? ~0u : (1u << (count > 0 ? count : 0)) - 1; }

KVCFG_INLINE __m512i load_bytes(const uint8_t* from, int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(first_bytes(count), from);
}

// The bfloat16 of every 8-bit element without its sign: upper and lower bytes.
struct ByteTable {
    alignas(64) uint8_t low[128], high[128];
};

inline ByteTable byte_table(int64_t format) {
    ByteTable table;
    for (int code = 0; code < 128; ++code) {
        const Bytes bits = Bytes{} + static_cast<uint8_t>(code);
        const Floats number = format == kE4M3 ? from_e4m3(bits) : format == kE5M2 ? from_e5m2(bits) : from_int8(bits);
        const uint16_t half = to_bfloat16(number[0]);
        table.low[code] = static_cast<uint8_t>(half);
        table.high[code] = static_cast<uint8_t>(half >> 8);
    }
    return table;
}

// The numbers of 4-bit codes as bfloat16, in units that round them least: number = unit * entry.
struct CodeTable {
    alignas(64) uint16_t entries[32];  // twice, so that one more bit of an index does not count
    float unit;
};

inline float from_bits(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

inline CodeTable code_table(const float* levels) {
    CodeTable best;
    float least = __builtin_inff();
    for (int step = 0; step < 64; ++step) {
        const float factor = 1.0f + static_cast<float>(step) / 64;
        CodeTable tried;
        float error = 0;
        for (int code = 0; code < 16; ++code) {
            tried.entries[code] = tried.entries[code + 16] = to_bfloat16(levels[code] * factor);
            const float missed = from_bits(tried.entries[code]) / factor - levels[code];
            error += missed * missed;
        }
        tried.unit = 1.0f / factor;
        if (error < least) {
            least = error;
            best = tried;
        }
    }
    return best;
}

// Tables of a call; those of the last levels are kept, as they are the same layer after layer.
struct Tables {
    ByteTable e4m3 = byte_table(kE4M3), e5m2 = byte_table(kE5M2), int8 = byte_table(kInt8);
    CodeTable codes[2] = {};
    float levels[32] = {};
    bool has_levels = false;

    void know(const float* called) {
        if (called == nullptr || (has_levels && memcmp(called, levels, sizeof levels) == 0)) return;
        memcpy(levels, called, sizeof levels);
        codes[0] = code_table(levels);
        codes[1] = code_table(levels + 16);
        has_levels = true;
    }
};

// 64 numbers of a row from `begin` on as bfloat16, those past `dim` 0: two units of 32.
struct BFloat16Row {
    KVCFG_INLINE static void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* units) {
        const uint8_t* from = row + begin * 2;
        units[0] = _mm512_maskz_loadu_epi16(first_words(dim - begin), from);
        units[1] = _mm512_maskz_loadu_epi16(first_words(dim - begin - 32), from + 64);
    }
};

KVCFG_INLINE void look_up(__m512i bytes, const ByteTable& table, __m512i* units) {
    // Unpacking works within 16 bytes; so that its results stand in order, eights of bytes are moved first.
    bytes = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), bytes);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), bytes, _mm512_load_si512(table.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table.high), bytes, _mm512_load_si512(table.high + 64));
    high = _mm512_ternarylogic_epi32(high, bytes, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    units[0] = _mm512_unpacklo_epi8(low, high);
    units[1] = _mm512_unpackhi_epi8(low, high);
}

struct ByteFloatRow {
    const ByteTable& table;
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* units) const {
        look_up(load_bytes(row + begin, dim - begin), table, units);
    }
};

struct Int8Row {
    const ByteTable& table;
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* units) const {
        const __m512i bytes = load_bytes(row + begin, dim - begin), sign = _mm512_set1_epi8(static_cast<char>(0x80));
        const __m512i magnitude = _mm512_abs_epi8(bytes);
        look_up(_mm512_ternarylogic_epi32(magnitude, bytes, sign, 0xf8), table, units);
    }
};

struct CodeRow {
    const CodeTable& table;
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* units) const {
        const __m512i entries = _mm512_load_si512(table.entries);
        const int64_t left = (dim - begin) / 2;
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t count = left - half * 16;
            const __mmask16 mask = count >= 16 ? 0xffff : static_cast<__mmask16>((1 << (count > 0 ? count : 0)) - 1);
            const __m512i pairs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + begin / 2 + half * 16));
            const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
            units[half] = _mm512_permutexvar_epi16(apart, entries);
        }
    }
};

}  // namespace
}  // namespace kvcfg
