// Products of pairs of bfloat16 with AVX-512, 32 an instruction, for what bfloat16 holds exactly: bfloat16 itself,
// 8-bit floats and int8; and for 4-bit codes, whose levels are taken in a unit in which they nearly are bfloat16. Sums
// are float32. Include after the pragma.
//
// Queries and weights have one digit, or two where queries are float32: number = high + low, each a bfloat16. With one,
// queries of bfloat16 are exact and a weight is off by 2^-9 of itself at most, as the output is; with two, by 2^-17.
//
//     score   vectors of 16 bytes of four tokens each, so that four lanes hold one token's sum. Four vectors hold 16
//             tokens, vector j those 4 * lane + j, which then add up in order
//     weigh   pairs of tokens, 64 numbers at a time in four vectors, whose order is undone once a chunk

#pragma once

#include "attend_core.h"
#include "avx512.h"

namespace kvcfg {
namespace {

KVCFG_INLINE __m512 add_pairs(__m512 sums, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}

// The bfloat16 of 16 levels in a unit of their own, lower and upper bytes, four times.
struct CodeTable {
    alignas(64) uint8_t low[64], high[64];
    float unit;
};

inline float as_bfloat16(float number) {
    const uint32_t bits = static_cast<uint32_t>(to_bfloat16(number)) << 16;
    float rounded;
    memcpy(&rounded, &bits, 4);
    return rounded;
}

// The unit, of many between 1 and 2, in which the level that is rounded most is rounded least: a third of 2^-9, mostly.
inline float best_unit(const float* levels) {
    float best = 1.0f, least = -kMinusInfinity;
    for (int number = 0; number < 4096 && least > 0; ++number) {
        const float unit = 1.0f + static_cast<float>(number) / 4096;
        float most = 0;
        for (int code = 0; code < 16; ++code) {
            const float level = levels[code] / unit;
            const float off = level == 0 ? 0 : __builtin_fabsf(as_bfloat16(level) / level - 1);
            most = off > most ? off : most;
        }
        if (most < least) {
            least = most;
            best = unit;
        }
    }
    return best;
}

// Kept from call to call.
inline const CodeTable& code_table(const float* levels) {
    static thread_local float known[2][16];
    static thread_local CodeTable tables[2];
    static thread_local int next = 0;
    for (int i = 0; i < 2; ++i) {
        if (memcmp(known[i], levels, sizeof known[i]) == 0 && tables[i].unit != 0) return tables[i];
    }
    CodeTable& table = tables[next];
    memcpy(known[next], levels, sizeof known[next]);
    next ^= 1;
    table.unit = best_unit(levels);
    for (int i = 0; i < 64; ++i) {
        const uint16_t level = to_bfloat16(levels[i % 16] / table.unit);
        table.low[i] = static_cast<uint8_t>(level);
        table.high[i] = static_cast<uint8_t>(level >> 8);
    }
    return table;
}

struct BFloat16Pairs {
    static constexpr int kParts = 1;  // vectors of pairs in 64 stored bytes
    static constexpr bool kSplit = false;
    static int64_t row_bytes(int64_t dim) { return dim * 2; }

    KVCFG_INLINE void keys(__m512i stored, __m512i* pairs) const { pairs[0] = stored; }

    KVCFG_INLINE void values(const uint8_t* a, const uint8_t* b, int64_t begin, int64_t dim, __m512i* pairs) const {
        KVCFG_UNROLL
        for (int half = 0; half < 2; ++half) {
            const __m512i of_a = load_bytes(a + begin * 2 + half * 64, (dim - begin) * 2 - half * 64);
            const __m512i of_b = load_bytes(b + begin * 2 + half * 64, (dim - begin) * 2 - half * 64);
            pairs[half * 2] = _mm512_unpacklo_epi16(of_a, of_b);
            pairs[half * 2 + 1] = _mm512_unpackhi_epi16(of_a, of_b);
        }
    }

    KVCFG_INLINE static void in_order(__m512* sums) {
        const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
        KVCFG_UNROLL
        for (int half = 0; half < 4; half += 2) {
            const __m512d a = _mm512_castps_pd(sums[half]), b = _mm512_castps_pd(sums[half + 1]);
            sums[half] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b));
            sums[half + 1] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b));
        }
    }
};

template <bool kWhole>  // int8, else 8-bit floats
struct BytePairs {
    static constexpr int kParts = 2;
    static constexpr bool kSplit = false;
    const ByteTable& table;
    static int64_t row_bytes(int64_t dim) { return dim; }

    KVCFG_INLINE void keys(__m512i stored, __m512i* pairs) const {
        const __m512i places = kWhole ? _mm512_abs_epi8(stored) : stored;
        const __m512i low = look_up(table.low, places), high = with_signs(look_up(table.high, places), stored);
        pairs[0] = _mm512_unpacklo_epi8(low, high);
        pairs[1] = _mm512_unpackhi_epi8(low, high);
    }

    KVCFG_INLINE void values(const uint8_t* a, const uint8_t* b, int64_t begin, int64_t dim, __m512i* pairs) const {
        const __m512i of_a = load_bytes(a + begin, dim - begin), of_b = load_bytes(b + begin, dim - begin);
        keys(_mm512_unpacklo_epi8(of_a, of_b), pairs);
        keys(_mm512_unpackhi_epi8(of_a, of_b), pairs + 2);
    }

    KVCFG_INLINE static void in_order(__m512* sums) { turn_quarters(sums); }
};

// Codes two a byte. What a vector of bytes becomes are the numbers of lower, then of upper codes.
struct CodePairs {
    static constexpr int kParts = 4;
    static constexpr bool kSplit = true;
    const CodeTable& table;
    static int64_t row_bytes(int64_t dim) { return dim / 2; }

    KVCFG_INLINE void keys(__m512i stored, __m512i* pairs) const {
        const __m512i nibble = _mm512_set1_epi8(15);
        const __m512i codes[2] = {_mm512_and_si512(stored, nibble),
                                  _mm512_and_si512(_mm512_srli_epi16(stored, 4), nibble)};
        KVCFG_UNROLL
        for (int i = 0; i < 2; ++i) {
            const __m512i lower = _mm512_shuffle_epi8(_mm512_load_si512(table.low), codes[i]);
            const __m512i upper = _mm512_shuffle_epi8(_mm512_load_si512(table.high), codes[i]);
            pairs[2 * i] = _mm512_unpacklo_epi8(lower, upper);
            pairs[2 * i + 1] = _mm512_unpackhi_epi8(lower, upper);
        }
    }

    KVCFG_INLINE void values(const uint8_t* a, const uint8_t* b, int64_t begin, int64_t dim, __m512i* pairs) const {
        const __mmask32 mask = static_cast<__mmask32>(first_bytes((dim - begin) / 2));
        const __m256i of_a = _mm256_maskz_loadu_epi8(mask, a + begin / 2);
        const __m256i of_b = _mm256_maskz_loadu_epi8(mask, b + begin / 2);
        const __m512i first = _mm512_castsi256_si512(_mm256_unpacklo_epi8(of_a, of_b));
        keys(_mm512_inserti64x4(first, _mm256_unpackhi_epi8(of_a, of_b), 1), pairs);
    }

    KVCFG_INLINE static void in_order(__m512* sums) {
        __m512 quarters[4];
        KVCFG_UNROLL
        for (int i = 0; i < 2; ++i) {
            quarters[2 * i] = _mm512_unpacklo_ps(sums[i], sums[i + 2]);
            quarters[2 * i + 1] = _mm512_unpackhi_ps(sums[i], sums[i + 2]);
        }
        turn_quarters(quarters);
        sums[0] = quarters[0];
        sums[1] = quarters[2];
        sums[2] = quarters[1];
        sums[3] = quarters[3];
    }
};

template <int kDigits>
struct PairMath {
    static constexpr int64_t kPackedBytes = 2, kWeightBytes = kDigits * 2 * kChunk;
    static constexpr bool kRoundsWeights = kDigits == 1;
    static constexpr int64_t kDirectRows = 4;  // up to so many rows take keys and values as they are stored

    struct Constants {
        ByteTable e4m3, e5m2, int8;
        CodeTable codes[2];
    };
    static constexpr int64_t kConstantBytes = sizeof(Constants);

    static bool reads(int64_t format) { return format != kFloat32 && format != kFloat16; }

    static void prepare(const AttendCall& call, uint8_t* to) {
        static const ByteTable e4m3 = byte_table(kE4M3), e5m2 = byte_table(kE5M2), int8 = byte_table(kInt8);
        Constants& constants = *reinterpret_cast<Constants*>(to);
        memcpy(&constants.e4m3, &e4m3, sizeof e4m3);
        memcpy(&constants.e5m2, &e5m2, sizeof e5m2);
        memcpy(&constants.int8, &int8, sizeof int8);
        for (int side = 0; call.levels != nullptr && side < 2; ++side) {
            constants.codes[side] = code_table(call.levels + side * 16);
        }
    }

    // What a stored number that counts as 1 stands for.
    static float unit_of(const uint8_t* from, int64_t format, int side) {
        return format == kCodes4 ? reinterpret_cast<const Constants*>(from)->codes[side].unit : 1.0f;
    }

    template <class Use>
    KVCFG_INLINE static void with_pairs(const uint8_t* from, int64_t format, int side, const Use& use) {
        const Constants& constants = *reinterpret_cast<const Constants*>(from);
        switch (format) {
            case kBFloat16: return use(BFloat16Pairs{});
            case kE4M3: return use(BytePairs<false>{constants.e4m3});
            case kE5M2: return use(BytePairs<false>{constants.e5m2});
            case kInt8: return use(BytePairs<true>{constants.int8});
            default: return use(CodePairs{constants.codes[side]});
        }
    }

    // A query: for each digit its numbers in order, then of every 32 those of even places before those of odd ones, as
    // 4-bit codes take them.
    static int64_t plane(int64_t dim) { return round_up(dim, 32) * 2; }
    static int64_t query_bytes(int64_t dim) { return kDigits * 2 * plane(dim); }

    static void take_query(const AttendCall&, const float* query, int64_t dim, uint8_t* to) {
        const __m512i evens_first = _mm512_cvtepi8_epi16(
            _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,  //
                             1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
        for (int64_t begin = 0; begin < dim; begin += 32) {
            __m512 rest[2];
            KVCFG_UNROLL
            for (int half = 0; half < 2; ++half) {
                rest[half] = _mm512_maskz_loadu_ps(first_units(dim - begin - half * 16), query + begin + half * 16);
            }
            for (int digit = 0; digit < kDigits; ++digit, rest[0] = rest_of(rest[0]), rest[1] = rest_of(rest[1])) {
                const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(rest[1], rest[0]);
                uint8_t* numbers = to + digit * 2 * plane(dim) + begin * 2;
                _mm512_storeu_si512(numbers, bits);
                _mm512_storeu_si512(numbers + plane(dim), _mm512_permutexvar_epi16(evens_first, bits));
            }
        }
    }

    // What is left of numbers after a digit.
    KVCFG_INLINE static __m512 rest_of(__m512 numbers) {
        const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(numbers));
        return _mm512_sub_ps(numbers, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
    }

    static Floats rounded(Floats weights) {
        const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)weights));
        return (Floats)_mm512_slli_epi32(bits, 16);
    }

    static void take_weights(const float* weights, float, int64_t count, uint8_t* to, float*) {
        for (int64_t i = 0; i < count; i += 16) {
            __m512 rest = _mm512_loadu_ps(weights + i);
            KVCFG_UNROLL
            for (int digit = 0; digit < kDigits; ++digit) {
                const __m256i bits = (__m256i)_mm512_cvtneps_pbh(rest);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + digit * 2 * kChunk + i * 2), bits);
                rest = rest_of(rest);
            }
        }
    }

    static void in_order(const float* sums, int64_t dim, float* to) { memcpy(to, sums, dim * sizeof(float)); }

    // Calls `use(unit, pairs)` for every 16 stored bytes of 16 tokens: what they are of the tokens in two vectors.
    template <class Reader>
    struct StoredKeys {
        const Reader& reader;
        FourRows rows;

        KVCFG_INLINE void go_to(int64_t token) { rows.go_to(token); }
        template <class Use>
        KVCFG_INLINE void each_unit(int first, const Use& use) const {
            rows.each_unit(first, [&](int64_t unit, const __m512i* stored) {
                __m512i pairs[2][Reader::kParts];
                reader.keys(stored[0], pairs[0]);
                reader.keys(stored[1], pairs[1]);
                use(unit, pairs);
            });
        }
    };

    // The same after `pack_keys`: [groups of 16 tokens, 2, units, 2, parts] vectors.
    template <class Reader>
    struct PackedKeys {
        const uint8_t* packed;
        int64_t begin, units;
        const uint8_t* at;

        KVCFG_INLINE void go_to(int64_t token) { at = packed + (token - begin) * units * Reader::kParts * 16; }
        template <class Use>
        KVCFG_INLINE void each_unit(int first, const Use& use) const {
            const uint8_t* from = at + first * units * Reader::kParts * 64;
            for (int64_t unit = 0; unit < units; ++unit, from += 2 * Reader::kParts * 64) {
                __m512i pairs[2][Reader::kParts];
                KVCFG_UNROLL
                for (int i = 0; i < 2 * Reader::kParts; ++i) {
                    pairs[i / Reader::kParts][i % Reader::kParts] = _mm512_load_si512(from + i * 64);
                }
                use(unit, pairs);
            }
        }
    };

    template <class Reader>
    static void pack_keys(StoredKeys<Reader> stored, int64_t begin, int64_t end, uint8_t* packed) {
        for (int64_t token = begin; token < end; token += 16) {
            stored.go_to(token);
            for (int first = 0; first < 4; first += 2) {
                stored.each_unit(first, [&](int64_t, const __m512i(*pairs)[Reader::kParts]) {
                    KVCFG_UNROLL
                    for (int i = 0; i < 2 * Reader::kParts; ++i, packed += 64) {
                        _mm512_store_si512(packed, pairs[i / Reader::kParts][i % Reader::kParts]);
                    }
                });
            }
        }
    }

    template <int kRows, class Reader, class Keys, class Work_>
    static void score_run(Work_& work, Keys keys, int64_t begin, int64_t end, int64_t first_row, int64_t row,
                          const float* scales) {
        constexpr int kParts = Reader::kParts;
        const int64_t dim = work.key_dim, digit_bytes = 2 * plane(dim);
        const int64_t order = Reader::kSplit ? plane(dim) : 0;
        const uint8_t* queries = work.queries + (first_row + row) * query_bytes(dim) + order;
        float* scores = work.scores + row * kScores;
        Ahead::Stream ahead = work.ahead.stream((end - begin) / 4);
        for (int64_t token = begin; token < end; token += 16) {
            keys.go_to(token);
            __m512 products[kRows][4];
            KVCFG_UNROLL
            for (int first = 0; first < 4; first += 2) {
                ahead.some();
                ahead.some();
                __m512 sums[kRows][2];
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
                keys.each_unit(first, [&](int64_t unit, const __m512i(*pairs)[kParts]) __attribute__((always_inline)) {
                    KVCFG_UNROLL
                    for (int r = 0; r < kRows; ++r) {
                        const uint8_t* query = queries + r * query_bytes(dim) + unit * kParts * 16;
                        KVCFG_UNROLL
                        for (int part = 0; part < kParts; ++part) {
                            KVCFG_UNROLL
                            for (int digit = 0; digit < kDigits; ++digit) {
                                const __m512i numbers = to_all_quarters(query + digit * digit_bytes + part * 16);
                                sums[r][0] = add_pairs(sums[r][0], pairs[0][part], numbers);
                                sums[r][1] = add_pairs(sums[r][1], pairs[1][part], numbers);
                            }
                        }
                    }
                });
                KVCFG_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    products[r][first] = sums[r][0];
                    products[r][first + 1] = sums[r][1];
                }
            }
            const auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
            const __m512 scale = _mm512_loadu_ps(scales + token);
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const __m512 sums = sums_of_quarters(products[r], add);
                _mm512_storeu_ps(scores + r * kScores + token, _mm512_mul_ps(sums, scale));
            }
        }
    }

    template <class Work_>
    static void score(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count, int64_t first_row,
                      const float* scales) {
        each_run(formats, count, [&](int64_t first, int64_t end) {
            with_pairs(work.constants, formats[first], 0, [&](const auto& reader) {
                using Reader = std::decay_t<decltype(reader)>;
                const StoredKeys<Reader> stored{reader, {rows, end, Reader::row_bytes(work.key_dim), {}}};
                const PackedKeys<Reader> packed{work.packed, first, stored.rows.units(), nullptr};
                const bool direct = work.rows <= kDirectRows;
                if (!direct) pack_keys(stored, first, end, work.packed);
                each_rows(work.rows, [&](auto number, int64_t row) {
                    constexpr int kRows = decltype(number)::kCount;
                    direct ? score_run<kRows, Reader>(work, stored, first, end, first_row, row, scales)
                           : score_run<kRows, Reader>(work, packed, first, end, first_row, row, scales);
                });
            });
        });
    }

    template <class Reader>
    struct StoredValues {
        const Reader& reader;
        const uint8_t* const* rows;
        int64_t end, dim;
        KVCFG_INLINE void values(int64_t token, int64_t begin, __m512i* pairs) const {
            reader.values(rows[token], rows[less(token + 1, end - 1)], begin, dim, pairs);
        }
    };

    struct PackedValues {
        const uint8_t* packed;
        int64_t first, width;
        KVCFG_INLINE void values(int64_t token, int64_t begin, __m512i* pairs) const {
            const uint8_t* from = packed + (token - first) * width * 2 + begin * 4;
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) pairs[i] = _mm512_load_si512(from + i * 64);
        }
    };

    template <class Reader>
    static void pack_values(const Reader& reader, const uint8_t* const* rows, int64_t first, int64_t end, int64_t dim,
                            uint8_t* packed) {
        const StoredValues<Reader> stored{reader, rows, end, dim};
        for (int64_t token = first; token < end; token += 2) {
            for (int64_t begin = 0; begin < dim; begin += 64, packed += 256) {
                __m512i pairs[4];
                stored.values(token, begin, pairs);
                KVCFG_UNROLL
                for (int i = 0; i < 4; ++i) _mm512_store_si512(packed + i * 64, pairs[i]);
            }
        }
    }

    template <int kRows, class Reader, class Values, class Work_>
    static void weigh_run(Work_& work, const Values& source, int64_t first, int64_t end, int64_t first_row, int64_t row,
                          int64_t begin) {
        const uint8_t* weights = work.weights + row * kWeightBytes;
        __m512 added[kRows][4];
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) added[r][i] = _mm512_setzero_ps();
        }
        Ahead::Stream ahead = work.ahead.stream((end - first) / 8);
        for (int64_t token = first; token < end; token += 2) {
            __m512i values[4];
            source.values(token, begin, values);
            const int32_t kept = token + 1 < end ? -1 : 0xffff;  // past the end of the run nothing has weight
            KVCFG_UNROLL
            for (int r = 0; r < kRows; ++r) {
                KVCFG_UNROLL
                for (int digit = 0; digit < kDigits; ++digit) {
                    int32_t pair;
                    memcpy(&pair, weights + r * kWeightBytes + digit * 2 * kChunk + token * 2, 4);
                    const __m512i weight = _mm512_set1_epi32(pair & kept);
                    KVCFG_UNROLL
                    for (int i = 0; i < 4; ++i) added[r][i] = add_pairs(added[r][i], values[i], weight);
                }
            }
            if ((token - first) % 8 == 0) ahead.some();
        }
        KVCFG_UNROLL
        for (int r = 0; r < kRows; ++r) {
            Reader::in_order(added[r]);
            float* to = work.sums + (first_row + row + r) * work.width + begin;
            const __m512 correction = _mm512_set1_ps(first == 0 ? work.corrections[row + r] : 1.0f);
            KVCFG_UNROLL
            for (int i = 0; i < 4; ++i) {
                _mm512_storeu_ps(to + i * 16, _mm512_fmadd_ps(_mm512_loadu_ps(to + i * 16), correction, added[r][i]));
            }
        }
    }

    template <class Work_>
    static void weigh(Work_& work, const uint8_t* const* rows, const uint8_t* formats, int64_t count,
                      int64_t first_row) {
        const int64_t dim = work.value_dim;
        each_run(formats, count, [&](int64_t first, int64_t end) {
            with_pairs(work.constants, formats[first], 1, [&](const auto& reader) {
                using Reader = std::decay_t<decltype(reader)>;
                const StoredValues<Reader> stored{reader, rows, end, dim};
                const PackedValues packed{work.packed, first, work.width};
                const bool direct = work.rows <= kDirectRows;
                if (!direct) pack_values(reader, rows, first, end, dim, work.packed);
                each_rows(work.rows, [&](auto number, int64_t row) {
                    constexpr int kRows = decltype(number)::kCount;
                    for (int64_t begin = 0; begin < dim; begin += 64) {
                        direct ? weigh_run<kRows, Reader>(work, stored, first, end, first_row, row, begin)
                               : weigh_run<kRows, Reader>(work, packed, first, end, first_row, row, begin);
                    }
                });
            });
        });
    }
};

}  // namespace
}  // namespace kvcfg
