// Products in float32, of every element format, on every CPU. Include after the pragma that chooses an
// instruction set.

#pragma once

#include "attend_core.h"

namespace kvcfg {
namespace {

// Sixteen numbers of a stored row from number `begin` on; past `dim` they are 0.
inline Floats read_numbers(const uint8_t* row, int64_t format, int64_t begin, int64_t dim, const float* levels) {
    static const int64_t bits_of[] = {32, 16, 16, 8, 8, 8, 4};
    const int64_t bits = bits_of[format];
    alignas(64) uint8_t tail[64];
    const uint8_t* from = row + begin * bits / 8;
    const bool whole = begin + 16 <= dim;
    if (!whole) {
        memset(tail, 0, sizeof tail);
        memcpy(tail, from, (dim - begin) * bits / 8);
        from = tail;
    }
    switch (format) {
        case kFloat32: return load<Floats>(from);
        case kFloat16: return from_float16(load<Halves>(from));
        case kBFloat16: return from_bfloat16(load<Halves>(from));
        case kE4M3: return from_e4m3(load<Bytes>(from));
        case kE5M2: return from_e5m2(load<Bytes>(from));
        case kInt8: return from_int8(load<Bytes>(from));
        default: break;
    }
    Floats numbers = {};
    const int64_t count = whole ? 16 : dim - begin;
    for (int64_t i = 0; i < count; ++i) numbers[i] = levels[(from[i / 2] >> (i % 2 * 4)) & 15];
    return numbers;
}

struct PlainTranspose {
    static void of(Floats* rows) {
        Floats columns[16];
        KVCFG_UNROLL
        for (int i = 0; i < 16; ++i) {
            KVCFG_UNROLL
            for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
        }
        memcpy(rows, columns, sizeof columns);
    }
};

// Rows and groups of 16 tokens, or of 16 numbers of a value, that are multiplied at a time: what registers hold.
template <int kRows, int kTiles, class Transpose>
struct FloatMath {
    static constexpr int64_t kWeightBytes = 0, kPackedBytes = 4;
    static constexpr int64_t kConstantBytes = 0;
    static constexpr bool kRoundsWeights = false;
    static void prepare(const AttendCall&, uint8_t*) {}
    static float unit_of(const uint8_t*, int64_t, int) { return 1.0f; }


    static int64_t query_bytes(int64_t dim) { return dim * 4; }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        memcpy(to, query, dim * 4);
    }

    // [groups of 16 tokens, dim, 16]
    static void pack_keys(const AttendCall& call, const uint8_t* const* rows, const uint8_t* formats,
                          int64_t count, int64_t dim, uint8_t* packed) {
        Floats block[16];
        for (int64_t group = 0; group < count; group += 16) {
            float* to = reinterpret_cast<float*>(packed) + group * dim;
            for (int64_t begin = 0; begin < dim; begin += 16) {
                KVCFG_UNROLL
                for (int i = 0; i < 16; ++i) {
                    block[i] = read_numbers(rows[group + i], formats[group + i], begin, dim, call.levels);
                }
                Transpose::of(block);
                for (int64_t i = 0; i < less(16, dim - begin); ++i) store(to + (begin + i) * 16, block[i]);
            }
        }
    }

    // [tokens, dim rounded up to 16]
    static void pack_values(const AttendCall& call, const uint8_t* const* rows, const uint8_t* formats,
                            int64_t count, int64_t dim, uint8_t* packed) {
        float* to = reinterpret_cast<float*>(packed);
        const float* levels = call.levels == nullptr ? nullptr : call.levels + 16;
        for (int64_t token = 0; token < count; ++token) {
            for (int64_t begin = 0; begin < dim; begin += 16, to += 16) {
                store(to, read_numbers(rows[token], formats[token], begin, dim, levels));
            }
        }
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows_of_tokens, const uint8_t* formats,
                      int64_t count, int64_t first_row, const float* scales) {
        pack_keys(work.call, rows_of_tokens, formats, count, work.key_dim, work.packed);
        score_packed(work, count, first_row, scales, work.key_dim);
    }

    // Queries and packed keys have rows of `dim` numbers.
    template <class Work_>
    static void score_packed(Work_& work, int64_t count, int64_t first_row, const float* scales, int64_t dim) {
        const float* queries = reinterpret_cast<const float*>(work.queries) + first_row * dim;
        const float* keys = reinterpret_cast<const float*>(work.packed);
        for (int64_t row = 0; row < work.rows; row += kRows) {
            for (int64_t token = 0; token < count; token += 16 * kTiles) {
                score_tile(queries + row * dim, less(kRows, work.rows - row), keys + token * dim,
                           less(kTiles, (count - token + 15) / 16), dim, scales + token,
                           work.scores + row * kScores + token);
            }
        }
    }

    static void score_tile(const float* queries, int64_t rows, const float* keys, int64_t tiles, int64_t dim,
                           const float* scales, float* scores) {
        Floats sums[kRows][kTiles] = {};
        const float* from[kRows];
        const float* groups[kTiles];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) from[r] = queries + (r < rows ? r : 0) * dim;
        KVCFG_UNROLL
        for (int t = 0; t < kTiles; ++t) groups[t] = keys + (t < tiles ? t : 0) * dim * 16;
        for (int64_t i = 0; i < dim; ++i) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                const Floats key = load<Floats>(groups[t] + i * 16);
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) sums[r][t] += key * from[r][i];
            }
        }
        for (int r = 0; r < rows; ++r) {
            for (int t = 0; t < tiles; ++t) {
                store(scores + r * kScores + t * 16, sums[r][t] * load<Floats>(scales + t * 16));
            }
        }
    }

    // Weights stay where they are.
    static void take_weights(const float*, float, int64_t, uint8_t*, float*) {}

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows_of_tokens, const uint8_t* formats,
                      int64_t count, int64_t first_row) {
        pack_values(work.call, rows_of_tokens, formats, count, work.value_dim, work.packed);
        weigh_packed(work, count, first_row, round_up(work.value_dim, 16));
    }

    // Packed values have rows of `width` numbers.
    template <class Work_>
    static void weigh_packed(Work_& work, int64_t count, int64_t first_row, int64_t width) {
        const float* values = reinterpret_cast<const float*>(work.packed);
        for (int64_t row = 0; row < work.rows; row += kRows) {
            const int64_t rows = less(kRows, work.rows - row);
            for (int64_t begin = 0; begin < width; begin += 16 * kTiles) {
                const int64_t tiles = less(kTiles, (width - begin) / 16);
                Floats sums[kRows][kTiles] = {};
                const float *weights[kRows], *tile[kTiles];
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    weights[r] = work.scores + (row + (r < rows ? r : 0)) * kScores;
                }
                KVCFG_UNROLL
                for (int t = 0; t < kTiles; ++t) tile[t] = values + begin + (t < tiles ? t : 0) * 16;
                for (int64_t token = 0; token < count; ++token) {
                    KVCFG_UNROLL
                    for (int t = 0; t < kTiles; ++t) {
                        const Floats value = load<Floats>(tile[t] + token * width);
                        KVCFG_UNROLL
                        for (int r = 0; r < kRows; ++r) sums[r][t] += value * weights[r][token];
                    }
                }
                for (int r = 0; r < rows; ++r) {
                    float* to = work.sums + (first_row + row + r) * work.width + begin;
                    for (int t = 0; t < tiles; ++t) {
                        store(to + t * 16, load<Floats>(to + t * 16) * work.corrections[row + r] + sums[r][t]);
                    }
                }
            }
        }
    }

    static void in_order(const float* sums, int64_t dim, float* to) { memcpy(to, sums, dim * sizeof(float)); }
};

}  // namespace
}  // namespace kvcfg
