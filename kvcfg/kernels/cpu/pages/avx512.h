// Sixteen 32-bit units at a time with AVX-512: loading stored rows, and putting them in the order that dot products of
// 4 bytes or 2 bfloat16 take. Include after the pragma that chooses the instruction set.

#pragma once

#include <immintrin.h>

#include "attend_chunk.h"

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

// The quarters of four vectors, columns to rows: vector i becomes the quarters i of all.
KVCFG_INLINE void turn_quarters(__m512* vectors) {
    const __m512 low_a = _mm512_shuffle_f32x4(vectors[0], vectors[1], 0x44), high_a = _mm512_shuffle_f32x4(vectors[0], vectors[1], 0xee);
    const __m512 low_b = _mm512_shuffle_f32x4(vectors[2], vectors[3], 0x44), high_b = _mm512_shuffle_f32x4(vectors[2], vectors[3], 0xee);
    vectors[0] = _mm512_shuffle_f32x4(low_a, low_b, 0x88);
    vectors[1] = _mm512_shuffle_f32x4(low_a, low_b, 0xdd);
    vectors[2] = _mm512_shuffle_f32x4(high_a, high_b, 0x88);
    vectors[3] = _mm512_shuffle_f32x4(high_a, high_b, 0xdd);
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

KVCFG_INLINE __mmask16 first_units(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << (count > 0 ? count : 0)) - 1);
}

KVCFG_INLINE __m512i load_bytes(const uint8_t* from, int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(first_bytes(count), from);
}

// The sums of the quarters of four vectors: lane 4 * quarter + i is that of vector i.
template <class Vector, class Add>
KVCFG_INLINE Vector sums_of_quarters(const Vector* four, const Add& add) {
    Vector halves[2];
    KVCFG_UNROLL
    for (int i = 0; i < 2; ++i) {
        const __m512i a = (__m512i)four[2 * i], b = (__m512i)four[2 * i + 1];
        halves[i] = add((Vector)_mm512_unpacklo_epi32(a, b), (Vector)_mm512_unpackhi_epi32(a, b));
    }
    const __m512i a = (__m512i)halves[0], b = (__m512i)halves[1];
    return add((Vector)_mm512_unpacklo_epi64(a, b), (Vector)_mm512_unpackhi_epi64(a, b));
}

KVCFG_INLINE __m512i to_all_quarters(const uint8_t* from) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Stored rows of 16 tokens as vectors of four tokens each, 16 bytes of every one: vector j holds tokens 4 * quarter + j,
// so that `sums_of_quarters` of all four are the sums of the tokens in order. Past the end of a run its last token stands
// in: its scores are written anew by the next run, or lie past the chunk.
struct FourRows {
    const uint8_t* const* rows;
    int64_t end, row_bytes;
    const uint8_t* at[16];

    KVCFG_INLINE void go_to(int64_t token) {
        for (int64_t i = 0; i < 16; ++i) at[i] = rows[less(token + i, end - 1)];
    }

    int64_t units() const { return (row_bytes + 15) / 16; }

    // Calls `use(unit, vectors)` for every 16 bytes of a row, with vectors first and first + 1; zeros follow the row.
    template <class Use>
    KVCFG_INLINE void each_unit(int first, const Use& use) const {
        for (int64_t begin = 0; begin < row_bytes; begin += 64) {
            __m512 blocks[2][4];
            KVCFG_UNROLL
            for (int vector = 0; vector < 2; ++vector) {
                KVCFG_UNROLL
                for (int i = 0; i < 4; ++i) {
                    blocks[vector][i] = _mm512_castsi512_ps(load_bytes(at[4 * i + first + vector] + begin, row_bytes - begin));
                }
                turn_quarters(blocks[vector]);
            }
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) {
                if (begin + i * 16 >= row_bytes) break;
                const __m512i vectors[2] = {_mm512_castps_si512(blocks[0][i]), _mm512_castps_si512(blocks[1][i])};
                use(begin / 16 + i, vectors);
            }
        }
    }
};

// The bfloat16 of every 8-bit element without its sign: upper and lower bytes. Of int8 those of the numbers 0 … 127.
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

// The upper bit of a place does not count.
KVCFG_INLINE __m512i look_up(const uint8_t* table, __m512i places) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), places, _mm512_load_si512(table + 64));
}

KVCFG_INLINE __m512i with_signs(__m512i upper_bytes, __m512i elements) {
    return _mm512_ternarylogic_epi32(upper_bytes, elements, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
}

// Rows are read 64 numbers at a time, those past `dim` 0, as four vectors of float32: numbers 0, 2, … 30 | 1, 3, … 31
// | 32, 34, … 62 | 33, 35, … 63. What holds two numbers in 32 bits falls apart like this at no cost.

KVCFG_INLINE void split_words(__m512i words, __m512* numbers) {
    numbers[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    numbers[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

KVCFG_INLINE void split_floats(__m512 first, __m512 second, __m512* numbers) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    numbers[0] = _mm512_permutex2var_ps(first, even, second);
    numbers[1] = _mm512_permutex2var_ps(first, _mm512_or_si512(even, _mm512_set1_epi32(1)), second);
}

// Place of a number in a row that was read.
KVCFG_INLINE int64_t place_of(int64_t number) {
    const int64_t within = number % 32;
    return number - within + within % 2 * 16 + within / 2;
}

struct Float32Row {
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        const uint8_t* from = row + begin * 4;
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512 first = _mm512_maskz_loadu_ps(first_units(dim - begin - half * 32), from + half * 128);
            const __m512 second = _mm512_maskz_loadu_ps(first_units(dim - begin - half * 32 - 16), from + half * 128 + 64);
            split_floats(first, second, numbers + half * 2);
        }
    }
};

struct Float16Row {
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512i halves = _mm512_maskz_loadu_epi16(first_words(dim - begin - half * 32), row + begin * 2 + half * 64);
            split_floats(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)),
                         _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), numbers + half * 2);
        }
    }
};

struct BFloat16Row {
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            split_words(_mm512_maskz_loadu_epi16(first_words(dim - begin - half * 32), row + begin * 2 + half * 64),
                        numbers + half * 2);
        }
    }
};

struct ByteFloatRow {
    const ByteTable& table;
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        // Unpacking works within 16 bytes; so that its results stand in order, eights of bytes are moved first.
        const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        const __m512i bytes = _mm512_permutexvar_epi64(order, load_bytes(row + begin, dim - begin));
        const __m512i low = look_up(table.low, bytes), high = with_signs(look_up(table.high, bytes), bytes);
        split_words(_mm512_unpacklo_epi8(low, high), numbers);
        split_words(_mm512_unpackhi_epi8(low, high), numbers + 2);
    }
};

struct Int8Row {
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        const __m512i bytes = load_bytes(row + begin, dim - begin);
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512i pairs = _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(bytes)
                                                                  : _mm512_extracti64x4_epi64(bytes, 1));
            numbers[half * 2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
            numbers[half * 2 + 1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 24));
        }
    }
};

struct CodeRow {
    const float* levels;  // [16]
    KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512* numbers) const {
        const __m512 table = _mm512_loadu_ps(levels);
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __mmask16 mask = first_units((dim - begin - half * 32) / 2);
            const __m512i pairs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + begin / 2 + half * 16));
            numbers[half * 2] = _mm512_maskz_permutexvar_ps(mask, pairs, table);
            numbers[half * 2 + 1] = _mm512_maskz_permutexvar_ps(mask, _mm512_srli_epi32(pairs, 4), table);
        }
    }
};

template <int kNumber>
struct Number {
    static constexpr int kCount = kNumber;
};

// Calls `use(Number<count>, first)` for rows four at a time, and for those that are left.
template <class Use>
void each_rows(int64_t rows, const Use& use) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) use(Number<4>{}, row);
    switch (rows - row) {
        case 3: return use(Number<3>{}, row);
        case 2: return use(Number<2>{}, row);
        case 1: return use(Number<1>{}, row);
        default: return;
    }
}

// Calls `use(begin, end)` for every run of tokens of one format.
template <class Use>
void each_run(const uint8_t* formats, int64_t count, const Use& use) {
    for (int64_t begin = 0, end; begin < count; begin = end) {
        for (end = begin + 1; end < count && formats[end] == formats[begin]; ++end) {}
        use(begin, end);
    }
}

// Scores of kRows rows and 16 / kRows tokens (of three rows as of four), lane after lane, times the scales of tokens.
template <int kRows>
KVCFG_INLINE void store_scores(__m512 products, const float* scales, float* scores) {
    if (kRows == 1) {
        _mm512_storeu_ps(scores, _mm512_mul_ps(products, _mm512_loadu_ps(scales)));
    } else if (kRows == 2) {
        const __m256 scale = _mm256_loadu_ps(scales);
        _mm256_storeu_ps(scores, _mm256_mul_ps(_mm512_castps512_ps256(products), scale));
        _mm256_storeu_ps(scores + kScores, _mm256_mul_ps(_mm512_extractf32x8_ps(products, 1), scale));
    } else {
        const __m512 scaled = _mm512_mul_ps(products, _mm512_broadcast_f32x4(_mm_loadu_ps(scales)));
        _mm_storeu_ps(scores, _mm512_castps512_ps128(scaled));
        _mm_storeu_ps(scores + kScores, _mm512_extractf32x4_ps(scaled, 1));
        _mm_storeu_ps(scores + 2 * kScores, _mm512_extractf32x4_ps(scaled, 2));
        if (kRows == 4) _mm_storeu_ps(scores + 3 * kScores, _mm512_extractf32x4_ps(scaled, 3));
    }
}

}  // namespace
}  // namespace kvcfg
