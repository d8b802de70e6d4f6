// Products in float32 with AVX-512, of every element format. Few rows take keys and values as they are stored, and
// unpack them in registers; for many rows a chunk is unpacked once.

#pragma once

#include "attend_float.h"
#include "avx512.h"

namespace kvcfg {
namespace {

struct FastTranspose {
    KVCFG_INLINE static void of(Floats* rows) { transpose(reinterpret_cast<__m512i*>(rows)); }
};

struct FusedMath {
    using Packed = FloatMath<4, 4, FastTranspose>;
    static constexpr int64_t kPackedBytes = 4, kWeightBytes = 0;
    static constexpr int64_t kConstantBytes = 0;
    static constexpr bool kRoundsWeights = false;
    static void prepare(const AttendCall&, uint8_t*) {}
    static float unit_of(const uint8_t*, int64_t, int) { return 1.0f; }

    static int64_t padded(int64_t dim) { return round_up(dim, 64); }
    static int64_t query_bytes(int64_t dim) { return padded(dim) * 4; }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        float* numbers = reinterpret_cast<float*>(to);
        memset(to, 0, query_bytes(dim));
        for (int64_t i = 0; i < dim; ++i) numbers[place_of(i)] = query[i];
    }

    static void take_weights(const float*, float, int64_t, uint8_t*, float*) {}

    static void in_order(const float* sums, int64_t dim, float* to) {
        for (int64_t i = 0; i < dim; ++i) to[i] = sums[place_of(i)];
    }

    struct Tables {
        ByteTable e4m3 = byte_table(kE4M3), e5m2 = byte_table(kE5M2);
    };

    // Calls `use` with the reader of a format.
    template <class Use>
    KVCFG_INLINE static void with_row(const AttendCall& call, int64_t format, int side, const Use& use) {
        static const Tables tables;
        switch (format) {
            case kFloat32: return use(Float32Row{});
            case kFloat16: return use(Float16Row{});
            case kBFloat16: return use(BFloat16Row{});
            case kE4M3: return use(ByteFloatRow{tables.e4m3});
            case kE5M2: return use(ByteFloatRow{tables.e5m2});
            case kInt8: return use(Int8Row{});
            default: return use(CodeRow{call.levels + side * 16});
        }
    }

    // The last group of a run may hold tokens past it: their rows are read again, and their scores are written anew by
    // the next run, or lie past the chunk.
    template <int kRows, class Row, class Work_>
    static void score_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                             int64_t first_row, int64_t row, const float* scales) {
        constexpr int kSlots = kRows == 3 ? 4 : kRows, kTokens = 16 / kSlots;
        const int64_t dim = work.key_dim, width = padded(dim);
        const float* queries = reinterpret_cast<const float*>(work.queries) + (first_row + row) * width;
        float* scores = work.scores + row * kScores;
        Ahead::Stream ahead = work.ahead.stream((end - first) / 4);
        for (int64_t token = first; token < end; token += kTokens) {
            __m512 products[16];
            KVCFG_UNROLL
            for (int i = 0; i < 16; ++i) products[i] = _mm512_setzero_ps();
            for (int step = 0; step < kTokens; step += 4) ahead.some();
            for (int64_t begin = 0; begin < dim; begin += 64) {
                KVCFG_UNROLL
                for (int t = 0; t < kTokens; t += 2) {
                    __m512 keys[2][4];
                    reader.read(rows[less(token + t, end - 1)], begin, dim, keys[0]);
                    reader.read(rows[less(token + t + 1, end - 1)], begin, dim, keys[1]);
                    KVCFG_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        KVCFG_UNROLL
                        for (int part = 0; part < 4; ++part) {
                            const __m512 query = _mm512_loadu_ps(queries + r * width + begin + part * 16);
                            const int at = r * kTokens + t;
                            products[at] = _mm512_fmadd_ps(keys[0][part], query, products[at]);
                            products[at + 1] = _mm512_fmadd_ps(keys[1][part], query, products[at + 1]);
                        }
                    }
                }
            }
            const __m512 sums = sums_of(products, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
            store_scores<kRows>(sums, scales + token, scores + token);
        }
    }

    template <class Row, class Work_>
    static void score_rows(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                           int64_t first_row, const float* scales) {
        each_rows(work.rows, [&](auto number, int64_t row) {
            score_stored<decltype(number)::kCount>(work, reader, rows, first, end, first_row, row, scales);
        });
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                      int64_t first_row, const float* scales) {
        if (work.rows <= kFewRows) {
            return each_run(formats, count, [&](int64_t first, int64_t end) {
                with_row(work.call, formats[first], 0, [&](const auto& reader) {
                    score_rows(work, reader, rows, first, end, first_row, scales);
                });
            });
        }
        const int64_t width = padded(work.key_dim);
        float* packed = reinterpret_cast<float*>(work.packed);
        for (int64_t group = 0; group < count; group += 16) {
            for (int64_t begin = 0; begin < width; begin += 64) {
                Floats blocks[4][16];
                for (int i = 0; i < 16; ++i) {
                    __m512 numbers[4];
                    with_row(work.call, formats[group + i], 0, [&](const auto& reader) {
                        reader.read(rows[group + i], begin, work.key_dim, numbers);
                    });
                    for (int part = 0; part < 4; ++part) blocks[part][i] = (Floats)numbers[part];
                }
                for (int part = 0; part < 4; ++part) {
                    FastTranspose::of(blocks[part]);
                    memcpy(packed + group * width + (begin + part * 16) * 16, blocks[part], sizeof blocks[part]);
                }
            }
        }
        Packed::score_packed(work, count, first_row, scales, width);
    }

    template <int kRows, class Row, class Work_>
    static void weigh_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                             int64_t first_row, int64_t row, int64_t begin) {
        const float* weights = work.scores + row * kScores;
        __m512 added[kRows][4];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int part = 0; part < 4; ++part) added[r][part] = _mm512_setzero_ps();
        }
        Ahead::Stream ahead = work.ahead.stream((end - first) / 8);
        for (int64_t token = first; token < end; ++token) {
            __m512 values[4];
            reader.read(rows[token], begin, work.value_dim, values);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const __m512 weight = _mm512_set1_ps(weights[r * kScores + token]);
                KVCFG_UNROLL
                for (int part = 0; part < 4; ++part) added[r][part] = _mm512_fmadd_ps(values[part], weight, added[r][part]);
            }
            if (token % 8 == 0) ahead.some();
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float* to = work.sums + (first_row + row + r) * work.width + begin;
            const __m512 correction = _mm512_set1_ps(first == 0 ? work.corrections[row + r] : 1.0f);
            KVCFG_UNROLL
            for (int part = 0; part < 4; ++part) {
                const __m512 before = _mm512_loadu_ps(to + part * 16);
                _mm512_storeu_ps(to + part * 16, _mm512_fmadd_ps(before, correction, added[r][part]));
            }
        }
    }

    template <class Row, class Work_>
    static void weigh_rows(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t first, int64_t end,
                           int64_t first_row) {
        for (int64_t begin = 0; begin < work.value_dim; begin += 64) {
            each_rows(work.rows, [&](auto number, int64_t row) {
                weigh_stored<decltype(number)::kCount>(work, reader, rows, first, end, first_row, row, begin);
            });
        }
    }

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                      int64_t first_row) {
        if (work.rows <= kFewRows) {
            return each_run(formats, count, [&](int64_t first, int64_t end) {
                with_row(work.call, formats[first], 1, [&](const auto& reader) {
                    weigh_rows(work, reader, rows, first, end, first_row);
                });
            });
        }
        const int64_t width = padded(work.value_dim);
        float* to = reinterpret_cast<float*>(work.packed);
        for (int64_t token = 0; token < count; ++token) {
            for (int64_t begin = 0; begin < width; begin += 64, to += 64) {
                __m512 numbers[4];
                with_row(work.call, formats[token], 1, [&](const auto& reader) {
                    reader.read(rows[token], begin, work.value_dim, numbers);
                });
                for (int part = 0; part < 4; ++part) _mm512_storeu_ps(to + part * 16, numbers[part]);
            }
        }
        Packed::weigh_packed(work, count, first_row, width);
    }
};

}  // namespace
}  // namespace kvcfg
