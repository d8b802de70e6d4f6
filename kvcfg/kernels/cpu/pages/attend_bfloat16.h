// Products of bfloat16: two a lane and instruction. Stored numbers of 8 bits and less are bfloat16 without loss, or
// nearly so; queries and weights are taken in one part, or in two that hold twice the digits.

#pragma once

#include "attend_core.h"
#include "avx512.h"

namespace kvcfg {
namespace {

inline Tables& tables() {
    static thread_local Tables all;
    return all;
}

template <int kParts>
struct BFloat16Math {
    static constexpr int64_t kPackedBytes = 2, kPart = kChunk * 2, kWeightBytes = kParts * kPart;

    static int64_t part_bytes(int64_t dim) { return round_up(dim, 64) * 2; }
    static int64_t query_bytes(int64_t dim) { return kParts * part_bytes(dim); }

    static float code_unit(const AttendCall& call, int side) {
        if (call.levels == nullptr) return 1.0f;
        tables().know(call.levels);
        return tables().codes[side].unit;
    }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        memset(to, 0, query_bytes(dim));
        for (int64_t i = 0; i < dim; ++i) {
            float rest = query[i];
            KVCFG_UNROLL
            for (int part = 0; part < kParts; ++part) {
                const uint16_t half = to_bfloat16(rest);
                memcpy(to + part * part_bytes(dim) + i * 2, &half, 2);
                rest -= from_bits(half);
            }
        }
    }

    template <class Row>
    static void pack_keys_of(const Row& row, const uint8_t* const* rows, int64_t dim, uint8_t* to) {
        const int64_t twos = (dim + 1) / 2;
        for (int64_t begin = 0; begin < dim; begin += 64) {
            __m512i first[16], second[16];
            KVCFG_UNROLL
            for (int i = 0; i < 16; ++i) {
                __m512i units[2];
                row.read(rows[i], begin, dim, units);
                first[i] = units[0];
                second[i] = units[1];
            }
            transpose(first);
            uint8_t* place = to + begin / 2 * 64;
            const int64_t units = twos - begin / 2;
            if (units >= 32) {
                KVCFG_UNROLL
                for (int i = 0; i < 16; ++i) _mm512_storeu_si512(place + i * 64, first[i]);
                transpose(second);
                KVCFG_UNROLL
                for (int i = 0; i < 16; ++i) _mm512_storeu_si512(place + (16 + i) * 64, second[i]);
                continue;
            }
            for (int i = 0; i < less(16, units); ++i) _mm512_storeu_si512(place + i * 64, first[i]);
            if (units <= 16) continue;
            transpose(second);
            for (int i = 0; i < units - 16; ++i) _mm512_storeu_si512(place + (16 + i) * 64, second[i]);
        }
    }

    // Calls `use(row reader)` with the reader of a format.
    template <class Use>
    static void with_row(int64_t format, int side, const Use& use) {
        const Tables& known = tables();
        switch (format) {
            case kBFloat16: return use(BFloat16Row{});
            case kE4M3: return use(ByteFloatRow{known.e4m3});
            case kE5M2: return use(ByteFloatRow{known.e5m2});
            case kInt8: return use(Int8Row{known.int8});
            default: return use(CodeRow{known.codes[side]});
        }
    }

    // [groups of 16 tokens, dim / 2, 16, 2]
    static void pack_keys(const uint8_t* const* rows, const uint8_t* formats, int64_t count, int64_t dim,
                          uint8_t* packed) {
        const int64_t group_bytes = (dim + 1) / 2 * 64;
        for (int64_t group = 0; group < count; group += 16) {
            const int64_t format = same_format(formats + group, 16);
            uint8_t* to = packed + group / 16 * group_bytes;
            if (format >= 0) {
                with_row(format, 0, [&](const auto& row) { pack_keys_of(row, rows + group, dim, to); });
            } else {
                pack_keys_of(MixedRows{formats + group, rows + group, 0}, rows + group, dim, to);
            }
        }
    }

    static int64_t same_format(const uint8_t* formats, int64_t count) {
        for (int64_t i = 1; i < count; ++i) {
            if (formats[i] != formats[0]) return -1;
        }
        return formats[0];
    }

    // The row whose pointer is given, in its own format.
    struct MixedRows {
        const uint8_t* formats;
        const uint8_t* const* rows;
        int side;
        void read(const uint8_t* row, int64_t begin, int64_t dim, __m512i* units) const {
            int place = 0;
            while (rows[place] != row) ++place;
            with_row(formats[place], side, [&](const auto& reader) { reader.read(row, begin, dim, units); });
        }
    };

    template <class Row>
    static void pack_values_of(const Row& row, const uint8_t* const* rows, int64_t count, int64_t dim, uint8_t* to) {
        const __m512i low = interleaved(0), high = interleaved(16);
        for (int64_t token = 0; token < count; token += 2) {
            for (int64_t begin = 0; begin < dim; begin += 64) {
                __m512i a[2], b[2];
                row.read(rows[token], begin, dim, a);
                row.read(rows[token + 1], begin, dim, b);
                const int64_t halves = dim - begin > 32 ? 2 : 1;
                for (int half = 0; half < halves; ++half, to += 128) {
                    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a[half], low, b[half]));
                    _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi16(a[half], high, b[half]));
                }
            }
        }
    }

    // Words first .. first + 15 of two vectors in turn.
    static __m512i interleaved(int first) {
        alignas(64) uint16_t index[32];
        KVCFG_UNROLL
        for (int i = 0; i < 16; ++i) {
            index[2 * i] = static_cast<uint16_t>(first + i);
            index[2 * i + 1] = static_cast<uint16_t>(first + i + 32);
        }
        return _mm512_load_si512(index);
    }

    // [tokens / 2, dim rounded up to 32, 2]
    static void pack_values(const uint8_t* const* rows, const uint8_t* formats, int64_t format, int64_t count,
                            int64_t dim, uint8_t* packed) {
        count = round_up(count, 2);
        if (format >= 0) {
            with_row(format, 1, [&](const auto& row) { pack_values_of(row, rows, count, dim, packed); });
            return;
        }
        for (int64_t token = 0; token < count; token += 2) {
            pack_values_of(MixedRows{formats + token, rows + token, 1}, rows + token, 2, dim,
                           packed + token * round_up(dim, 32) * 2);
        }
    }

    template <int kRows, int kTiles>
    static void score_tile(const uint8_t* queries, int64_t dim, const uint8_t* keys, const float* scales, float* scores) {
        const int64_t twos = (dim + 1) / 2, tile_bytes = twos * 64;
        __m512 sums[kRows][kTiles];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) sums[r][t] = _mm512_setzero_ps();
        }
        for (int64_t i = 0; i < twos; ++i) {
            __m512bh key[kTiles];
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) key[t] = (__m512bh)_mm512_loadu_si512(keys + t * tile_bytes + i * 64);
            KVCFG_UNROLL
            for (int part = 0; part < kParts; ++part) {
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const __m512bh query = pair(queries + r * query_bytes(dim) + part * part_bytes(dim) + i * 4);
                    KVCFG_UNROLL
                    for (int t = 0; t < kTiles; ++t) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], key[t], query);
                }
            }
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                _mm512_storeu_ps(scores + r * kChunk + t * 16, _mm512_mul_ps(sums[r][t], _mm512_loadu_ps(scales + t * 16)));
            }
        }
    }

    KVCFG_INLINE static __m512bh pair(const uint8_t* from) {
        int32_t bits;
        memcpy(&bits, from, 4);
        return (__m512bh)_mm512_set1_epi32(bits);
    }

    template <int kRows, class Work_>
    static void score_rows(Work_& work, int64_t count, int64_t first_row, int64_t row, const float* scales) {
        const int64_t dim = work.key_dim, token_bytes = (dim + 1) / 2 * 4;
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim);
        float* scores = work.scores + row * kChunk;
        int64_t token = 0;
        for (; token + 64 <= round_up(count, 16); token += 64) {
            score_tile<kRows, 4>(queries, dim, work.packed + token * token_bytes, scales + token, scores + token);
        }
        for (; token < count; token += 16) {
            score_tile<kRows, 1>(queries, dim, work.packed + token * token_bytes, scales + token, scores + token);
        }
    }

    // Products of rows with keys as they are stored: lane by lane, and the lanes of 16 products added at once.
    template <int kRows, class Row, class Work_>
    static void score_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t count,
                             int64_t first_row, int64_t row, const float* scales) {
        constexpr int kSlots = kRows == 3 ? 4 : kRows, kTokens = 16 / kSlots;
        const int64_t dim = work.key_dim;
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim);
        float* scores = work.scores + row * kChunk;
        for (int64_t token = 0; token < count; token += kTokens) {
            __m512 products[16];
            KVCFG_UNROLL
            for (int i = 0; i < 16; ++i) products[i] = _mm512_setzero_ps();
            KVCFG_UNROLL
            for (int step = 0; step < kTokens; step += 4) work.ahead.some();
            for (int64_t begin = 0; begin < dim; begin += 64) {
                KVCFG_UNROLL
                for (int t = 0; t < kTokens; ++t) {
                    __m512i key[2];
                    reader.read(rows[token + t], begin, dim, key);
                    KVCFG_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        const uint8_t* query = queries + r * query_bytes(dim) + begin * 2;
                        __m512& product = products[r * kTokens + t];
                        KVCFG_UNROLL
                        for (int part = 0; part < kParts; ++part) {
                            const uint8_t* from = query + part * part_bytes(dim);
                            product = _mm512_dpbf16_ps(product, (__m512bh)key[0], (__m512bh)_mm512_loadu_si512(from));
                            product = _mm512_dpbf16_ps(product, (__m512bh)key[1], (__m512bh)_mm512_loadu_si512(from + 64));
                        }
                    }
                }
            }
            alignas(64) float scored[16];
            _mm512_store_ps(scored, sums_of(products, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                KVCFG_UNROLL
                for (int t = 0; t < kTokens; ++t) {
                    scores[r * kChunk + token + t] = scored[r * kTokens + t] * scales[token + t];
                }
            }
        }
    }

    template <class Row, class Work_>
    static void score_stored_rows(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t count,
                                  int64_t first_row, const float* scales) {
        int64_t row = 0;
        for (; row + 4 <= work.rows; row += 4) score_stored<4>(work, reader, rows, count, first_row, row, scales);
        switch (work.rows - row) {
            case 3: return score_stored<3>(work, reader, rows, count, first_row, row, scales);
            case 2: return score_stored<2>(work, reader, rows, count, first_row, row, scales);
            case 1: return score_stored<1>(work, reader, rows, count, first_row, row, scales);
            default: return;
        }
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t format, int64_t count,
                      int64_t first_row, const float* scales) {
        if (work.rows <= kFewRows && format >= 0) {
            return with_row(format, 0, [&](const auto& reader) {
                score_stored_rows(work, reader, rows, count, first_row, scales);
            });
        }
        pack_keys(rows, formats, count, work.key_dim, work.packed);
        int64_t row = 0;
        for (; row + 4 <= work.rows; row += 4) score_rows<4>(work, count, first_row, row, scales);
        switch (work.rows - row) {
            case 3: return score_rows<3>(work, count, first_row, row, scales);
            case 2: return score_rows<2>(work, count, first_row, row, scales);
            case 1: return score_rows<1>(work, count, first_row, row, scales);
            default: return;
        }
    }

    static void take_weights(const AttendCall&, const float* weights, const float* scales, int64_t count, uint8_t* to,
                             float* scale) {
        for (int64_t i = 0; i < count; i += 16) {
            __m512 rest = _mm512_mul_ps(_mm512_loadu_ps(weights + i), _mm512_loadu_ps(scales + i));
            KVCFG_UNROLL
            for (int part = 0; part < kParts; ++part) {
                const __m256i halves = (__m256i)_mm512_cvtneps_pbh(rest);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * kPart + i * 2), halves);
                if (part + 1 == kParts) break;
                const __m512i taken = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
                rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(taken));
            }
        }
        *scale = 1.0f;
    }

    template <int kRows, int kTiles>
    static void weigh_tile(const uint8_t* weights, const uint8_t* values, int64_t row_bytes, int64_t count,
                           const float* corrections, float* sums, int64_t stride) {
        __m512 added[kRows][kTiles];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) added[r][t] = _mm512_setzero_ps();
        }
        for (int64_t token = 0; token < count; token += 2) {
            __m512bh value[kTiles];
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) value[t] = (__m512bh)_mm512_loadu_si512(values + token * row_bytes + t * 64);
            KVCFG_UNROLL
            for (int part = 0; part < kParts; ++part) {
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const __m512bh weight = pair(weights + r * kWeightBytes + part * kPart + token * 2);
                    KVCFG_UNROLL
                    for (int t = 0; t < kTiles; ++t) added[r][t] = _mm512_dpbf16_ps(added[r][t], value[t], weight);
                }
            }
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const __m512 correction = _mm512_set1_ps(corrections[r]);
            KVCFG_UNROLL
            for (int t = 0; t < kTiles; ++t) {
                float* to = sums + r * stride + t * 16;
                _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), correction, added[r][t]));
            }
        }
    }

    template <int kRows, class Work_>
    static void weigh_rows(Work_& work, int64_t count, int64_t first_row, int64_t row) {
        const int64_t width = round_up(work.value_dim, 32), pairs = round_up(count, 2);
        const uint8_t* weights = work.weights + row * kWeightBytes;
        float* sums = work.sums + (first_row + row) * work.width;
        int64_t begin = 0;
        for (; begin + 64 <= width; begin += 64) {
            weigh_tile<kRows, 4>(weights, work.packed + begin * 4, width * 2, pairs, work.corrections + row, sums + begin,
                                 work.width);
        }
        if (begin < width) {
            weigh_tile<kRows, 2>(weights, work.packed + begin * 4, width * 2, pairs, work.corrections + row, sums + begin,
                                 work.width);
        }
    }

    // Weights times values as they are stored: two tokens are merged in registers.
    template <int kRows, class Row, class Work_>
    static void weigh_stored(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t count,
                             int64_t first_row, int64_t row, int64_t begin) {
        const __m512i low = interleaved(0), high = interleaved(16);
        const uint8_t* weights = work.weights + row * kWeightBytes;
        __m512 added[kRows][4];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int t = 0; t < 4; ++t) added[r][t] = _mm512_setzero_ps();
        }
        for (int64_t token = 0; token < count; token += 2) {
            __m512i a[2], b[2];
            reader.read(rows[token], begin, work.value_dim, a);
            reader.read(rows[token + 1], begin, work.value_dim, b);
            const __m512i value[4] = {_mm512_permutex2var_epi16(a[0], low, b[0]), _mm512_permutex2var_epi16(a[0], high, b[0]),
                                      _mm512_permutex2var_epi16(a[1], low, b[1]), _mm512_permutex2var_epi16(a[1], high, b[1])};
            KVCFG_UNROLL
            for (int part = 0; part < kParts; ++part) {
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    const __m512bh weight = pair(weights + r * kWeightBytes + part * kPart + token * 2);
                    KVCFG_UNROLL
                    for (int t = 0; t < 4; ++t) added[r][t] = _mm512_dpbf16_ps(added[r][t], (__m512bh)value[t], weight);
                }
            }
            if (token % 8 == 0) work.ahead.some();
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float* to = work.sums + (first_row + row + r) * work.width + begin;
            const __m512 correction = _mm512_set1_ps(work.corrections[row + r]);
            KVCFG_UNROLL
            for (int t = 0; t < 4; ++t) {
                _mm512_storeu_ps(to + t * 16, _mm512_fmadd_ps(_mm512_loadu_ps(to + t * 16), correction, added[r][t]));
            }
        }
    }

    template <class Row, class Work_>
    static void weigh_stored_rows(Work_& work, const Row& reader, const uint8_t* const* rows, int64_t count,
                                  int64_t first_row) {
        for (int64_t begin = 0; begin < work.value_dim; begin += 64) {
            int64_t row = 0;
            for (; row + 4 <= work.rows; row += 4) weigh_stored<4>(work, reader, rows, count, first_row, row, begin);
            switch (work.rows - row) {
                case 3: weigh_stored<3>(work, reader, rows, count, first_row, row, begin); break;
                case 2: weigh_stored<2>(work, reader, rows, count, first_row, row, begin); break;
                case 1: weigh_stored<1>(work, reader, rows, count, first_row, row, begin); break;
                default: break;
            }
        }
    }

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t format, int64_t count,
                      int64_t first_row) {
        if (work.rows <= kFewRows && format >= 0) {
            return with_row(format, 1, [&](const auto& reader) {
                weigh_stored_rows(work, reader, rows, count, first_row);
            });
        }
        pack_values(rows, formats, format, count, work.value_dim, work.packed);
        int64_t row = 0;
        for (; row + 4 <= work.rows; row += 4) weigh_rows<4>(work, count, first_row, row);
        switch (work.rows - row) {
            case 3: return weigh_rows<3>(work, count, first_row, row);
            case 2: return weigh_rows<2>(work, count, first_row, row);
            case 1: return weigh_rows<1>(work, count, first_row, row);
            default: return;
        }
    }

    static void in_order(const float* sums, int64_t dim, float* to) { memcpy(to, sums, dim * sizeof(float)); }
};

}  // namespace
}  // namespace kvcfg
