// Products of int8 keys and values: four of them a lane and instruction.
//
// Queries and weights have 16 bits, in two digits: q = 256 * high + low. An instruction multiplies unsigned by signed
// bytes. Keys are made unsigned by adding 128, which adds 128 times the sum of a query's digits: it is taken off by
// starting from minus that. Weights are not negative, so that their digits are unsigned and values stay as they are.

#pragma once

#include "attend_core.h"
#include "avx512.h"

namespace kvcfg {
namespace {

struct VnniMath {
    static constexpr int64_t kPackedBytes = 1, kWeightBytes = 2 * kChunk;
    static constexpr int64_t kDirectRows = 4;  // up to so many rows take keys as they are stored
    static constexpr int64_t kConstantBytes = 0;
    static constexpr bool kRoundsWeights = false;
    static void prepare(const AttendCall&, uint8_t*) {}
    static float unit_of(const uint8_t*, int64_t, int) { return 1.0f; }

    // A query: high digits | low digits, each rounded up to 64, then what follows.
    struct Query {
        float scale;
        int32_t start;  // sums are whole numbers modulo 2^32; that of a token and row is below 2^31
    };

    static int64_t plane(int64_t dim) { return round_up(dim, 64); }
    static int64_t query_bytes(int64_t dim) { return 2 * plane(dim) + 64; }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        __m512 most = _mm512_setzero_ps(), poison = _mm512_setzero_ps();
        for (int64_t i = 0; i < dim; i += 16) {
            const __m512 numbers = _mm512_maskz_loadu_ps(first_units(dim - i), query + i);
            most = _mm512_max_ps(_mm512_abs_ps(numbers), most);
            poison = _mm512_fmadd_ps(numbers, _mm512_setzero_ps(), poison);
        }
        const float largest_code = static_cast<float>(less(127 * 256 + 127, INT32_MAX / 128 / dim));
        const float largest = _mm512_reduce_max_ps(most);
        const __m512 factor = _mm512_set1_ps(largest > 0 ? largest_code / largest : 0.0f);
        __m512i sum_of_codes = _mm512_setzero_si512();
        for (int64_t i = 0; i < plane(dim); i += 16) {
            const __m512 numbers = _mm512_maskz_loadu_ps(first_units(dim - i), query + i);
            const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(numbers, factor));
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
            const __m512i low = _mm512_sub_epi32(codes, _mm512_slli_epi32(high, 8));
            sum_of_codes = _mm512_add_epi32(sum_of_codes, codes);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + plane(dim) + i), _mm512_cvtepi32_epi8(low));
        }
        const Query facts = {largest / largest_code + _mm512_reduce_add_ps(poison),
                             -128 * _mm512_reduce_add_epi32(sum_of_codes)};
        memcpy(to + 2 * plane(dim), &facts, sizeof facts);
    }

    // [tokens / 4, dim / 64, 4, 16, 4]: of each 64 numbers, vector j holds those 16 * lane + 4 * j + 0..3 of four tokens
    static void pack_values(const uint8_t* const* rows, int64_t count, int64_t dim, uint8_t* packed) {
        const int64_t width = plane(dim);
        for (int64_t token = 0; token < count; token += 4) {
            uint8_t* to = packed + token * width;
            for (int64_t begin = 0; begin < dim; begin += 64, to += 256) {
                __m512i four[4];
                KVCFG_UNROLL
                for (int i = 0; i < 4; ++i) four[i] = load_bytes(rows[token + i] + begin, dim - begin);
                const __m512i low_a = _mm512_unpacklo_epi8(four[0], four[1]), high_a = _mm512_unpackhi_epi8(four[0], four[1]);
                const __m512i low_b = _mm512_unpacklo_epi8(four[2], four[3]), high_b = _mm512_unpackhi_epi8(four[2], four[3]);
                _mm512_storeu_si512(to, _mm512_unpacklo_epi16(low_a, low_b));
                _mm512_storeu_si512(to + 64, _mm512_unpackhi_epi16(low_a, low_b));
                _mm512_storeu_si512(to + 128, _mm512_unpacklo_epi16(high_a, high_b));
                _mm512_storeu_si512(to + 192, _mm512_unpackhi_epi16(high_a, high_b));
            }
        }
    }

    // Products of rows with keys as they are stored: lane by lane, and the lanes of 16 products added at once.
    template <int kRows, int kBlocks, class Work_>
    static void score_stored(Work_& work, const uint8_t* const* rows, int64_t count, int64_t first_row, int64_t row,
                             const float* scales) {
        constexpr int kSlots = kRows == 3 ? 4 : kRows, kTokens = 16 / kSlots, kStep = 2;
        const int64_t dim = work.key_dim, tail = dim - (kBlocks - 1) * 64;
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim);
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        alignas(64) int32_t starts[16];
        alignas(64) float factors[16];
        for (int lane = 0; lane < 16; ++lane) {
            Query facts;
            memcpy(&facts, queries + less(lane / kTokens, kRows - 1) * query_bytes(dim) + 2 * plane(dim), sizeof facts);
            starts[lane] = facts.start;
            factors[lane] = facts.scale;
        }
        float* scores = work.scores + row * kScores;
        Ahead::Stream ahead = work.ahead.stream(count / 4);
        for (int64_t token = 0; token < count; token += kTokens) {
            __m512i products[16];
            KVCFG_UNROLL
            for (int step = 0; step < kTokens; step += kStep) {
                if (step % 4 == 0) ahead.some();
                __m512i key[kStep][kBlocks];
                KVCFG_UNROLL
                for (int t = 0; t < kStep; ++t) {
                    const uint8_t* from = rows[token + step + t];
                    KVCFG_UNROLL
                    for (int b = 0; b + 1 < kBlocks; ++b) {
                        key[t][b] = _mm512_xor_si512(_mm512_loadu_si512(from + b * 64), sign);
                    }
                    key[t][kBlocks - 1] = _mm512_xor_si512(load_bytes(from + (kBlocks - 1) * 64, tail), sign);
                }
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const uint8_t* query = queries + r * query_bytes(dim);
                    KVCFG_UNROLL
                    for (int t = 0; t < kStep; ++t) {
                        __m512i high = _mm512_setzero_si512();
                        KVCFG_UNROLL
                        for (int b = 0; b < kBlocks; ++b) {
                            high = _mm512_dpbusd_epi32(high, key[t][b], _mm512_loadu_si512(query + b * 64));
                        }
                        __m512i low = _mm512_slli_epi32(high, 8);
                        KVCFG_UNROLL
                        for (int b = 0; b < kBlocks; ++b) {
                            low = _mm512_dpbusd_epi32(low, key[t][b], _mm512_loadu_si512(query + plane(dim) + b * 64));
                        }
                        products[r * kTokens + step + t] = low;
                    }
                }
            }
            KVCFG_UNROLL
            for (int i = kRows * kTokens; i < 16; ++i) products[i] = _mm512_setzero_si512();
            const __m512i sums = sums_of(products, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
            const __m512i whole = _mm512_add_epi32(sums, _mm512_load_si512(starts));
            const __m512 scored = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_load_ps(factors));
            store_scores<kRows>(scored, scales + token, scores + token);
        }
    }

    template <int kRows, class Work_>
    static void score_stored_rows(Work_& work, const uint8_t* const* rows, int64_t count, int64_t first_row, int64_t row,
                                  const float* scales) {
        switch (plane(work.key_dim) / 64) {
            case 1: return score_stored<kRows, 1>(work, rows, count, first_row, row, scales);
            case 2: return score_stored<kRows, 2>(work, rows, count, first_row, row, scales);
            case 3: return score_stored<kRows, 3>(work, rows, count, first_row, row, scales);
            default: return score_stored<kRows, 4>(work, rows, count, first_row, row, scales);
        }
    }

    // For more rows keys are made unsigned, and put in the order of products, once: [groups of 16 tokens, 2, units, 2]
    // vectors.
    static void pack_keys(FourRows rows, int64_t count, uint8_t* packed) {
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        for (int64_t token = 0; token < count; token += 16) {
            rows.go_to(token);
            for (int first = 0; first < 4; first += 2) {
                rows.each_unit(first, [&](int64_t, const __m512i* stored) {
                    _mm512_store_si512(packed, _mm512_xor_si512(stored[0], sign));
                    _mm512_store_si512(packed + 64, _mm512_xor_si512(stored[1], sign));
                    packed += 128;
                });
            }
        }
    }

    template <int kRows, class Work_>
    static void score_packed(Work_& work, int64_t count, int64_t first_row, int64_t row, const float* scales) {
        const int64_t dim = work.key_dim, units = (dim + 15) / 16;
        const uint8_t *queries = work.queries + (first_row + row) * query_bytes(dim), *keys = work.packed;
        float* scores = work.scores + row * kScores;
        Query facts[kRows];
        for (int r = 0; r < kRows; ++r) memcpy(facts + r, queries + r * query_bytes(dim) + 2 * plane(dim), sizeof(Query));
        for (int64_t token = 0; token < count; token += 16) {
            __m512i products[kRows][4];
            KVCFG_UNROLL
            for (int first = 0; first < 4; first += 2) {
                __m512i high[kRows][2], low[kRows][2];
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
                for (int64_t unit = 0; unit < units; ++unit, keys += 128) {
                    const __m512i key[2] = {_mm512_load_si512(keys), _mm512_load_si512(keys + 64)};
                    KVCFG_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        const uint8_t* query = queries + r * query_bytes(dim) + unit * 16;
                        const __m512i high_digits = to_all_quarters(query), low_digits = to_all_quarters(query + plane(dim));
                        KVCFG_UNROLL
                        for (int i = 0; i < 2; ++i) {
                            high[r][i] = _mm512_dpbusd_epi32(high[r][i], key[i], high_digits);
                            low[r][i] = _mm512_dpbusd_epi32(low[r][i], key[i], low_digits);
                        }
                    }
                }
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    KVCFG_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        products[r][first + i] = _mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]);
                    }
                }
            }
            const __m512 scale = _mm512_loadu_ps(scales + token);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const __m512i sums = sums_of_quarters(products[r], [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
                const __m512i whole = _mm512_add_epi32(sums, _mm512_set1_epi32(facts[r].start));
                const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(facts[r].scale));
                _mm512_storeu_ps(scores + r * kScores + token, _mm512_mul_ps(_mm512_cvtepi32_ps(whole), factor));
            }
        }
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows, const uint8_t*, int64_t count, int64_t first_row,
                      const float* scales) {
        const bool as_stored = work.rows <= kDirectRows && work.key_dim <= 256;
        if (!as_stored) pack_keys({rows, round_up(count, 16), work.key_dim, {}}, count, work.packed);
        each_rows(work.rows, [&](auto number, int64_t row) {
            constexpr int kRows = decltype(number)::kCount;
            as_stored ? score_stored_rows<kRows>(work, rows, count, first_row, row, scales)
                      : score_packed<kRows>(work, count, first_row, row, scales);
        });
    }

    // High digits | low digits.
    static void take_weights(const float* weights, float top, int64_t count, uint8_t* to, float* scale) {
        const float largest_code = 255 * 256 + 255;
        const __m512 factor = _mm512_set1_ps(top > 0 ? largest_code / top : 0.0f);
        __m512 poison = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(weights + i), factor);
            poison = _mm512_fmadd_ps(scaled, _mm512_setzero_ps(), poison);
            const __m512i codes = _mm512_cvtps_epi32(scaled);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, 8)));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kChunk + i), _mm512_cvtepi32_epi8(codes));
        }
        *scale = top / largest_code + _mm512_reduce_add_ps(poison);
    }

    template <int kRows, int kTiles>
    static void weigh_tile(const uint8_t* weights, const uint8_t* values, int64_t width, int64_t count,
                           const float* scales, const float* corrections, float* sums, int64_t stride) {
        __m512i high[kRows][kTiles], low[kRows][kTiles];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) high[r][t] = low[r][t] = _mm512_setzero_si512();
        }
        for (int64_t token = 0; token < count; token += 4) {
            __m512i value[kTiles];
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) value[t] = _mm512_loadu_si512(values + token * width + t * 64);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                int32_t digits[2];
                memcpy(digits, weights + r * kWeightBytes + token, 4);
                memcpy(digits + 1, weights + r * kWeightBytes + kChunk + token, 4);
                const __m512i high_digits = _mm512_set1_epi32(digits[0]), low_digits = _mm512_set1_epi32(digits[1]);
                KVCFG_UNROLL
                for (int t = 0; t < kTiles; ++t) {
                    high[r][t] = _mm512_dpbusd_epi32(high[r][t], high_digits, value[t]);
                    low[r][t] = _mm512_dpbusd_epi32(low[r][t], low_digits, value[t]);
                }
            }
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                add(high[r][t], low[r][t], scales[r], corrections[r], sums + r * stride + t * 16);
            }
        }
    }

    template <int kRows, class Work_>
    static void weigh_rows(Work_& work, int64_t count, int64_t first_row, int64_t row) {
        constexpr int kTiles = kRows <= 2 ? 4 : 2;
        for (int64_t begin = 0; begin < work.width; begin += 16 * kTiles) {
            weigh_tile<kRows, kTiles>(work.weights + row * kWeightBytes, work.packed + begin * 4, work.width,
                                      round_up(count, 4), work.weight_scales + row, work.corrections + row,
                                      work.sums + (first_row + row) * work.width + begin, work.width);
        }
    }

    // Weights times values as they are stored: four tokens are merged in registers. Of each 64 numbers, vectors
    // 2 * kHalf and 2 * kHalf + 1.
    template <int kRows, int kHalf, class Work_>
    static void weigh_stored(Work_& work, const uint8_t* const* rows, int64_t count, int64_t first_row, int64_t row,
                             int64_t begin) {
        const int64_t left = work.value_dim - begin;
        const __mmask64 mask = first_bytes(left);
        const uint8_t* weights = work.weights + row * kWeightBytes;
        __m512i high[kRows][2], low[kRows][2];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
        Ahead::Stream ahead = work.ahead.stream(count / 16);
        for (int64_t token = 0; token < count; token += 4) {
            __m512i four[4], pairs[2];
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) four[i] = _mm512_maskz_loadu_epi8(mask, rows[token + i] + begin);
            KVCFG_UNROLL
            for (int i = 0; i < 2; ++i) {
                pairs[i] = kHalf == 0 ? _mm512_unpacklo_epi8(four[2 * i], four[2 * i + 1])
                                      : _mm512_unpackhi_epi8(four[2 * i], four[2 * i + 1]);
            }
            const __m512i first = _mm512_unpacklo_epi16(pairs[0], pairs[1]);
            const __m512i second = _mm512_unpackhi_epi16(pairs[0], pairs[1]);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                int32_t digits[2];
                memcpy(digits, weights + r * kWeightBytes + token, 4);
                memcpy(digits + 1, weights + r * kWeightBytes + kChunk + token, 4);
                const __m512i high_digits = _mm512_set1_epi32(digits[0]), low_digits = _mm512_set1_epi32(digits[1]);
                high[r][0] = _mm512_dpbusd_epi32(high[r][0], high_digits, first);
                high[r][1] = _mm512_dpbusd_epi32(high[r][1], high_digits, second);
                low[r][0] = _mm512_dpbusd_epi32(low[r][0], low_digits, first);
                low[r][1] = _mm512_dpbusd_epi32(low[r][1], low_digits, second);
            }
            if (token % 16 == 0) ahead.some();
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float* to = work.sums + (first_row + row + r) * work.width + begin + kHalf * 32;
            add(high[r][0], low[r][0], work.weight_scales[row + r], work.corrections[row + r], to);
            add(high[r][1], low[r][1], work.weight_scales[row + r], work.corrections[row + r], to + 16);
        }
    }

    KVCFG_INLINE static void add(__m512i high, __m512i low, float scale, float correction, float* to) {
        const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
        const __m512 before = _mm512_mul_ps(_mm512_loadu_ps(to), _mm512_set1_ps(correction));
        _mm512_storeu_ps(to, _mm512_fmadd_ps(whole, _mm512_set1_ps(scale), before));
    }

    template <int kRows, class Work_>
    static void weigh_stored_rows(Work_& work, const uint8_t* const* rows, int64_t count, int64_t first_row,
                                  int64_t row) {
        for (int64_t begin = 0; begin < work.value_dim; begin += 64) {
            weigh_stored<kRows, 0>(work, rows, count, first_row, row, begin);
            weigh_stored<kRows, 1>(work, rows, count, first_row, row, begin);
        }
    }

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows, const uint8_t*, int64_t count, int64_t first_row) {
        const bool as_stored = work.rows <= kFewRows;
        if (!as_stored) pack_values(rows, count, work.value_dim, work.packed);
        each_rows(work.rows, [&](auto number, int64_t row) {
            constexpr int kRows = decltype(number)::kCount;
            as_stored ? weigh_stored_rows<kRows>(work, rows, count, first_row, row)
                      : weigh_rows<kRows>(work, count, first_row, row);
        });
    }

    // Undo the order of pack_values. Of the last 64 numbers those past `dim` are 0.
    static void in_order(const float* sums, int64_t dim, float* to) {
        for (int64_t begin = 0; begin < dim; begin += 64) {
            __m512 four[4];
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) four[i] = _mm512_loadu_ps(sums + begin + i * 16);
            turn_quarters(four);
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) _mm512_mask_storeu_ps(to + begin + i * 16, first_units(dim - begin - i * 16), four[i]);
        }
    }
};

}  // namespace
}  // namespace kvcfg
