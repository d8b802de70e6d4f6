// Products of 16-bit whole numbers with AVX-512, for 8-bit floats with scales and 4-bit codes, also beside int8: two
// products a lane and instruction, twice as many as in float32. Include after the pragma.
//
//     stored numbers   whole numbers of up to 7168, each format in units of its own: 16 units to 1 in e4m3, 56 in
//                      int8, as many as fill the range in 4-bit codes
//     queries          up to 2047, in units of a row's own
//     weights          up to 2047, in units of a row's and chunk's own
//
// so that a sum over 128 numbers or tokens stays below 2^31, and the error of each factor below 1e-3 of its spread.

#pragma once

#include "attend_core.h"
#include "avx512.h"

namespace kvcfg {
namespace {

constexpr float kLargestWord = 7168, kLargestFactor = 2047;

struct WordMath {
    static constexpr int64_t kPackedBytes = 2, kWeightBytes = kChunk * 2, kWidest = 128;

    // The whole numbers of all 256 e4m3 elements: lower and upper bytes; those of codes, twice, so that one more bit
    // of an index does not count.
    struct Constants {
        alignas(64) uint8_t low[256], high[256];
        alignas(64) int16_t codes[2][32];
        float code_units[2];
    };
    static constexpr int64_t kConstantBytes = sizeof(Constants);

    static void prepare(const AttendCall& call, uint8_t* to) {
        Constants& constants = *reinterpret_cast<Constants*>(to);
        static const Constants e4m3 = e4m3_words();
        memcpy(&constants, &e4m3, sizeof constants);
        for (int side = 0; call.levels != nullptr && side < 2; ++side) {
            const float* levels = call.levels + side * 16;
            float most = 0;
            for (int code = 0; code < 16; ++code) most = __builtin_fabsf(levels[code]) > most ? __builtin_fabsf(levels[code]) : most;
            const float factor = most > 0 ? kLargestWord / most : 0.0f;
            for (int code = 0; code < 32; ++code) {
                constants.codes[side][code] = static_cast<int16_t>(__builtin_rintf(levels[code % 16] * factor));
            }
            constants.code_units[side] = most / kLargestWord;
        }
    }

    static Constants e4m3_words() {
        Constants constants = {};
        for (int code = 0; code < 256; ++code) {
            const float number = from_e4m3(Bytes{} + static_cast<uint8_t>(code))[0] * 16;
            const auto word = static_cast<uint16_t>(static_cast<int16_t>(number == number ? __builtin_rintf(number) : 0));
            constants.low[code] = static_cast<uint8_t>(word);
            constants.high[code] = static_cast<uint8_t>(word >> 8);
        }
        return constants;
    }

    static float unit_of(const uint8_t* constants, int64_t format, int side) {
        if (format == kE4M3) return 1.0f / 16;
        if (format == kInt8) return 1.0f / 56;
        return reinterpret_cast<const Constants*>(constants)->code_units[side];
    }

    // 64 numbers of a row in order, those past `dim` 0: two vectors of 32 words.
    struct FloatRow {
        const Constants& table;
        KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* words) const {
            // Unpacking works within 16 bytes; so that its results stand in order, eights of bytes are moved first.
            const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
            const __m512i bytes = _mm512_permutexvar_epi64(order, load_bytes(row + begin, dim - begin));
            const __mmask64 negative = _mm512_movepi8_mask(bytes);
            const __m512i low = looked_up(table.low, bytes, negative), high = looked_up(table.high, bytes, negative);
            words[0] = _mm512_unpacklo_epi8(low, high);
            words[1] = _mm512_unpackhi_epi8(low, high);
        }
        KVCFG_INLINE static __m512i looked_up(const uint8_t* table, __m512i bytes, __mmask64 negative) {
            const __m512i plus = _mm512_permutex2var_epi8(_mm512_load_si512(table), bytes, _mm512_load_si512(table + 64));
            const __m512i minus = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), bytes, _mm512_load_si512(table + 192));
            return _mm512_mask_blend_epi8(negative, plus, minus);
        }
    };

    struct IntRow {
        KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* words) const {
            const __m512i bytes = load_bytes(row + begin, dim - begin), units = _mm512_set1_epi16(56);
            words[0] = _mm512_mullo_epi16(_mm512_cvtepi8_epi16(_mm512_castsi512_si256(bytes)), units);
            words[1] = _mm512_mullo_epi16(_mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(bytes, 1)), units);
        }
    };

    struct CodesRow {
        const int16_t* table;
        KVCFG_INLINE void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* words) const {
            const __m512i entries = _mm512_load_si512(table);
            KVCFG_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t left = dim - begin - half * 32;
                const __mmask16 mask = first_units(left / 2);
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, row + begin / 2 + half * 16));
                const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 12));
                words[half] = _mm512_maskz_permutexvar_epi16(first_words(left), apart, entries);
            }
        }
    };

    template <class Use>
    KVCFG_INLINE static void with_row(const uint8_t* constants, int64_t format, int side, const Use& use) {
        const Constants& known = *reinterpret_cast<const Constants*>(constants);
        switch (format) {
            case kE4M3: return use(FloatRow{known});
            case kInt8: return use(IntRow{});
            default: return use(CodesRow{known.codes[side]});
        }
    }

    // A query: its words, rounded up to 64, then their unit.
    static int64_t query_bytes(int64_t dim) { return round_up(dim, 64) * 2 + 64; }
    static float unit_of_query(const uint8_t* query, int64_t dim) {
        float unit;
        memcpy(&unit, query + round_up(dim, 64) * 2, 4);
        return unit;
    }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        float most = 0, poison = 0;
        for (int64_t i = 0; i < dim; ++i) {
            most = __builtin_fabsf(query[i]) > most ? __builtin_fabsf(query[i]) : most;
            poison += query[i] * 0.0f;
        }
        memset(to, 0, query_bytes(dim));
        const float factor = most > 0 ? kLargestFactor / most : 0.0f, unit = most / kLargestFactor + poison;
        int16_t* words = reinterpret_cast<int16_t*>(to);
        for (int64_t i = 0; i < dim; ++i) words[i] = static_cast<int16_t>(_mm_cvtss_si32(_mm_set_ss(query[i] * factor)));
        memcpy(to + round_up(dim, 64) * 2, &unit, 4);
    }

    static void take_weights(const float* weights, float top, int64_t count, uint8_t* to, float* scale) {
        const __m512 factor = _mm512_set1_ps(top > 0 ? kLargestFactor / top : 0.0f);
        __m512 poison = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(weights + i), factor);
            poison = _mm512_fmadd_ps(scaled, _mm512_setzero_ps(), poison);
            const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * 2), words);
        }
        *scale = top / kLargestFactor + _mm512_reduce_add_ps(poison);
    }

    static void in_order(const float* sums, int64_t dim, float* to) { memcpy(to, sums, dim * sizeof(float)); }

    template <int kRows, class Row, class Work_>
    static void score_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                             int64_t first_row, int64_t row, const float* scales) {
        constexpr int kSlots = kRows == 3 ? 4 : kRows, kTokens = 16 / kSlots;
        const int64_t dim = work.key_dim;
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim);
        alignas(64) float units[16];
        for (int lane = 0; lane < 16; ++lane) {
            units[lane] = unit_of_query(queries + less(lane / kTokens, kRows - 1) * query_bytes(dim), dim);
        }
        float* scores = work.scores + row * kScores;
        Ahead::Stream ahead = work.ahead.stream((end - first) / 4);
        for (int64_t token = first; token < end; token += kTokens) {
            __m512i products[16];
            KVCFG_UNROLL
            for (int i = 0; i < 16; ++i) products[i] = _mm512_setzero_si512();
            for (int step = 0; step < kTokens; step += 4) ahead.some();
            for (int64_t begin = 0; begin < dim; begin += 64) {
                KVCFG_UNROLL
                for (int t = 0; t < kTokens; t += 2) {
                    __m512i keys[2][2];
                    reader.read(rows[less(token + t, end - 1)], begin, dim, keys[0]);
                    reader.read(rows[less(token + t + 1, end - 1)], begin, dim, keys[1]);
                    KVCFG_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        KVCFG_UNROLL
                        for (int half = 0; half < 2; ++half) {
                            const __m512i query = _mm512_loadu_si512(queries + r * query_bytes(dim) + begin * 2 + half * 64);
                            const int at = r * kTokens + t;
                            products[at] = _mm512_dpwssd_epi32(products[at], keys[0][half], query);
                            products[at + 1] = _mm512_dpwssd_epi32(products[at + 1], keys[1][half], query);
                        }
                    }
                }
            }
            const __m512i sums = sums_of(products, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
            const __m512 scored = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_load_ps(units));
            store_scores<kRows>(scored, scales + token, scores + token);
        }
    }

    template <int kRows, class Work_>
    static void score_rows(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                           int64_t first_row, int64_t row, const float* scales) {
        each_run(formats, count, [&](int64_t first, int64_t end) {
            with_row(work.constants, formats[first], 0, [&](const auto& reader) {
                score_stored<kRows>(work, reader, rows, first, end, first_row, row, scales);
            });
        });
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                      int64_t first_row, const float* scales) {
        const bool few = work.rows <= kFewRows;
        if (!few) pack_keys(work, rows, formats, count);
        each_rows(work.rows, [&](auto number, int64_t row) {
            constexpr int kRows = decltype(number)::kCount;
            few ? score_rows<kRows>(work, rows, formats, count, first_row, row, scales)
                : score_packed<kRows>(work, count, first_row, row, scales);
        });
    }

    // [groups of 16 tokens, dim rounded up to 64 / 2, 16, 2]
    template <class Work_>
    static void pack_keys(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count) {
        const int64_t width = round_up(work.key_dim, 64);
        for (int64_t group = 0; group < count; group += 16) {
            for (int64_t begin = 0; begin < width; begin += 64) {
                __m512i blocks[2][16];
                for (int i = 0; i < 16; ++i) {
                    with_row(work.constants, formats[group + i], 0, [&](const auto& reader) {
                        __m512i words[2];
                        reader.read(rows[group + i], begin, work.key_dim, words);
                        blocks[0][i] = words[0];
                        blocks[1][i] = words[1];
                    });
                }
                for (int half = 0; half < 2; ++half) {
                    transpose(blocks[half]);
                    memcpy(work.packed + group * width * 2 + (begin + half * 32) * 32, blocks[half], sizeof blocks[half]);
                }
            }
        }
    }

    template <int kRows, class Work_>
    static void score_packed(Work_& work, int64_t count, int64_t first_row, int64_t row, const float* scales) {
        const int64_t dim = work.key_dim, width = round_up(dim, 64);
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim);
        float* scores = work.scores + row * kScores;
        for (int64_t token = 0; token < count; token += 64) {
            const int64_t left = round_up(count, 16) - token;
            const uint8_t* keys = work.packed + token * width * 2;
            left >= 64 ? score_tile<kRows, 4>(queries, dim, keys, scales + token, scores + token)
                       : score_tail<kRows>(queries, dim, keys, scales + token, scores + token, left);
        }
    }

    template <int kRows>
    static void score_tail(const uint8_t* queries, int64_t dim, const uint8_t* keys, const float* scales, float* scores,
                           int64_t left) {
        for (int64_t token = 0; token < left; token += 16) {
            score_tile<kRows, 1>(queries, dim, keys + token * round_up(dim, 64) * 2, scales + token, scores + token);
        }
    }

    template <int kRows, int kTiles>
    static void score_tile(const uint8_t* queries, int64_t dim, const uint8_t* keys, const float* scales, float* scores) {
        const int64_t tile_bytes = round_up(dim, 64) * 32, twos = (dim + 1) / 2;
        __m512i products[kRows][kTiles];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) products[r][t] = _mm512_setzero_si512();
        }
        for (int64_t i = 0; i < twos; ++i) {
            __m512i key[kTiles];
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) key[t] = _mm512_loadu_si512(keys + t * tile_bytes + i * 64);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const __m512i query = two_words(queries + r * query_bytes(dim) + i * 4);
                KVCFG_UNROLL
                for (int t = 0; t < kTiles; ++t) products[r][t] = _mm512_dpwssd_epi32(products[r][t], key[t], query);
            }
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const __m512 unit = _mm512_set1_ps(unit_of_query(queries + r * query_bytes(dim), dim));
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                const __m512 factor = _mm512_mul_ps(unit, _mm512_loadu_ps(scales + t * 16));
                _mm512_storeu_ps(scores + r * kScores + t * 16, _mm512_mul_ps(_mm512_cvtepi32_ps(products[r][t]), factor));
            }
        }
    }

    KVCFG_INLINE static __m512i two_words(const uint8_t* from) {
        int32_t words;
        memcpy(&words, from, 4);
        return _mm512_set1_epi32(words);
    }

    // Words first … first + 15 of two vectors in turn.
    KVCFG_INLINE static __m512i in_turn(int first) {
        const __m512i pairs = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i low = _mm512_add_epi32(pairs, _mm512_set1_epi32(first));
        return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(32)), 16));
    }

    // Weights times values as they are stored, two tokens at a time.
    template <int kRows, class Row, class Work_>
    static void weigh_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                             int64_t first_row, int64_t row, int64_t begin) {
        const __m512i low = in_turn(0), high = in_turn(16);
        const uint8_t* weights = work.weights + row * kWeightBytes;
        __m512i added[kRows][4];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int part = 0; part < 4; ++part) added[r][part] = _mm512_setzero_si512();
        }
        Ahead::Stream ahead = work.ahead.stream((end - first) / 8);
        for (int64_t token = first; token < end; token += 2) {
            __m512i a[2], b[2], values[4];
            reader.read(rows[token], begin, work.value_dim, a);
            reader.read(rows[less(token + 1, end - 1)], begin, work.value_dim, b);
            KVCFG_UNROLL
            for (int half = 0; half < 2; ++half) {
                values[half * 2] = _mm512_permutex2var_epi16(a[half], low, b[half]);
                values[half * 2 + 1] = _mm512_permutex2var_epi16(a[half], high, b[half]);
            }
            // Past the end of the run the other token has no weight.
            const int32_t kept = token + 1 < end ? -1 : 0xffff;
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                int32_t words;
                memcpy(&words, weights + r * kWeightBytes + token * 2, 4);
                const __m512i weight = _mm512_set1_epi32(words & kept);
                KVCFG_UNROLL
                for (int part = 0; part < 4; ++part) added[r][part] = _mm512_dpwssd_epi32(added[r][part], values[part], weight);
            }
            if ((token - first) % 8 == 0) ahead.some();
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float* to = work.sums + (first_row + row + r) * work.width + begin;
            const float correction = first == 0 ? work.corrections[row + r] : 1.0f;
            KVCFG_UNROLL
            for (int part = 0; part < 4; ++part) add(added[r][part], work.weight_scales[row + r], correction, to + part * 16);
        }
    }

    KVCFG_INLINE static void add(__m512i words, float scale, float correction, float* to) {
        const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(correction));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(words), _mm512_set1_ps(scale), before));
    }

    template <int kRows, class Work_>
    static void weigh_rows(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                           int64_t first_row, int64_t row) {
        each_run(formats, count, [&](int64_t first, int64_t end) {
            with_row(work.constants, formats[first], 1, [&](const auto& reader) {
                for (int64_t begin = 0; begin < work.value_dim; begin += 64) {
                    weigh_stored<kRows>(work, reader, rows, first, end, first_row, row, begin);
                }
            });
        });
    }

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                      int64_t first_row) {
        const bool few = work.rows <= kFewRows;
        if (!few) pack_values(work, rows, formats, count);
        each_rows(work.rows, [&](auto number, int64_t row) {
            constexpr int kRows = decltype(number)::kCount;
            few ? weigh_rows<kRows>(work, rows, formats, count, first_row, row)
                : weigh_packed<kRows>(work, count, first_row, row);
        });
    }

    // [tokens / 2, dim rounded up to 64, 2]
    template <class Work_>
    static void pack_values(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count) {
        const __m512i low = in_turn(0), high = in_turn(16);
        uint8_t* to = work.packed;
        for (int64_t token = 0; token < count; token += 2) {
            for (int64_t begin = 0; begin < work.value_dim; begin += 64) {
                __m512i words[2][2];
                for (int i = 0; i < 2; ++i) {
                    with_row(work.constants, formats[token + i], 1, [&](const auto& reader) {
                        reader.read(rows[token + i], begin, work.value_dim, words[i]);
                    });
                }
                for (int half = 0; half < 2; ++half, to += 128) {
                    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(words[0][half], low, words[1][half]));
                    _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(words[0][half], high, words[1][half]));
                }
            }
        }
    }

    template <int kRows, class Work_>
    static void weigh_packed(Work_& work, int64_t count, int64_t first_row, int64_t row) {
        const int64_t width = round_up(work.value_dim, 64);
        const uint8_t* weights = work.weights + row * kWeightBytes;
        for (int64_t begin = 0; begin < width; begin += 64) {
            __m512i added[kRows][4];
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                KVCFG_UNROLL
                for (int part = 0; part < 4; ++part) added[r][part] = _mm512_setzero_si512();
            }
            for (int64_t token = 0; token < count; token += 2) {
                __m512i values[4];
                KVCFG_UNROLL
                for (int part = 0; part < 4; ++part) {
                    values[part] = _mm512_loadu_si512(work.packed + (token * width + begin * 2) * 2 + part * 64);
                }
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const __m512i weight = two_words(weights + r * kWeightBytes + token * 2);
                    KVCFG_UNROLL
                    for (int part = 0; part < 4; ++part) added[r][part] = _mm512_dpwssd_epi32(added[r][part], values[part], weight);
                }
            }
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                float* to = work.sums + (first_row + row + r) * work.width + begin;
                KVCFG_UNROLL
                for (int part = 0; part < 4; ++part) {
                    add(added[r][part], work.weight_scales[row + r], work.corrections[row + r], to + part * 16);
                }
            }
        }
    }
};

}  // namespace
}  // namespace kvcfg
