// The loops of closing pages with AVX-512.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "close.h"

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
#include "close_core.h"

namespace kvcfg {
namespace {

#define KVCFG_INLINE inline __attribute__((always_inline))

// What numbers are multiplied by before they are looked up, and what is taken away then.
struct Change {
    __m512 factor, offset;
};

// At most 16 levels looked up in registers: 32 bins of 256 cells, each with one edge in it at most.
class FewLevels {
  public:
    explicit FewLevels(const Levels& table)
        : levels_(_mm512_loadu_ps(table.levels)), low_(_mm512_set1_ps(table.low)),
          factor_(_mm512_set1_ps(table.cells_per_unit)) {
        codes_ = _mm512_cvtps_epi32(_mm512_loadu_ps(table.codes));
        alignas(64) float guesses[32], edges[32];
        for (int bin = 0; bin < 32; ++bin) {
            guesses[bin] = table.guess[8 * bin];
            edges[bin] = table.edges[int(table.guess[8 * bin])];
        }
        for (int half = 0; half < 2; ++half) {
            guesses_[half] = _mm512_cvtps_epi32(_mm512_load_ps(guesses + 16 * half));
            edges_[half] = _mm512_load_ps(edges + 16 * half);
        }
    }

    KVCFG_INLINE Change change(__m512 inverse) const {
        return {_mm512_mul_ps(inverse, factor_), _mm512_mul_ps(low_, factor_)};
    }
    KVCFG_INLINE __m512 nearest(__m512 numbers, const Change& change) const {
        return _mm512_permutexvar_ps(places(_mm512_fmsub_ps(numbers, change.factor, change.offset)), levels_);
    }

    KVCFG_INLINE __m512i codes(__m512 numbers) const {
        return _mm512_permutexvar_epi32(places(_mm512_mul_ps(_mm512_sub_ps(numbers, low_), factor_)), codes_);
    }

  private:
    KVCFG_INLINE __m512i places(__m512 any) const {
        const __m512 cells = _mm512_min_ps(_mm512_max_ps(any, _mm512_setzero_ps()), _mm512_set1_ps(8191.0f));
        const __m512i bins = _mm512_srli_epi32(_mm512_cvttps_epi32(cells), 8);
        const __m512 edges = _mm512_permutex2var_ps(edges_[0], bins, edges_[1]);
        const __m512i below = _mm512_permutex2var_epi32(guesses_[0], bins, guesses_[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(cells, edges, _CMP_GE_OQ);
        return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
    }

    __m512 levels_, low_, factor_, edges_[2];
    __m512i guesses_[2], codes_;
};

// Up to 64 levels looked up in memory.
class ManyLevels {
  public:
    explicit ManyLevels(const Levels& table) : table_(table) {}

    KVCFG_INLINE __m512i codes(__m512 numbers) const {
        const __m512 low = _mm512_set1_ps(table_.low), factor = _mm512_set1_ps(table_.cells_per_unit);
        const __m512 any = _mm512_mul_ps(_mm512_sub_ps(numbers, low), factor);
        const __m512 cells = _mm512_min_ps(_mm512_max_ps(any, _mm512_setzero_ps()), _mm512_set1_ps(8191.0f));
        const __m512i bins = _mm512_srli_epi32(_mm512_cvttps_epi32(cells), 5);
        const __m512i below = _mm512_cvtps_epi32(_mm512_i32gather_ps(bins, table_.guess, 4));
        const __mmask16 above = _mm512_cmp_ps_mask(cells, _mm512_i32gather_ps(below, table_.edges, 4), _CMP_GE_OQ);
        const __m512i places = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
        return _mm512_cvtps_epi32(_mm512_i32gather_ps(places, table_.codes, 4));
    }

  private:
    const Levels& table_;
};

class WholeNumbers {
  public:
    explicit WholeNumbers(const Levels& table)
        : low_(_mm512_set1_ps(table.levels[0])), high_(_mm512_set1_ps(table.levels[int(table.count) - 1])) {}

    KVCFG_INLINE Change change(__m512 inverse) const { return {inverse, _mm512_setzero_ps()}; }
    KVCFG_INLINE __m512 nearest(__m512 numbers, const Change& change) const {
        return rounded(_mm512_mul_ps(numbers, change.factor));
    }

    KVCFG_INLINE __m512i codes(__m512 numbers) const {
        const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
        const __m512 number = _mm512_mask_mov_ps(rounded(numbers), nan, _mm512_setzero_ps());
        return _mm512_cvtps_epi32(_mm512_sub_ps(number, low_));
    }

  private:
    KVCFG_INLINE __m512 rounded(__m512 numbers) const {
        const __m512 whole = _mm512_roundscale_ps(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_min_ps(high_, _mm512_max_ps(low_, whole));
    }

    __m512 low_, high_;
};

template <class Table>
KVCFG_INLINE float squared_error(const Table& table, const float* units, int64_t dim, float ratio, float shift) {
    const __m512 ratios = _mm512_set1_ps(ratio), shifts = _mm512_set1_ps(shift);
    const Change change = table.change(_mm512_set1_ps(1.0f / ratio));
    __m512 sum = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 16 <= dim; i += 16) {
        const __m512 numbers = _mm512_sub_ps(_mm512_load_ps(units + i), shifts);
        const __m512 rest = _mm512_fnmadd_ps(table.nearest(numbers, change), ratios, numbers);
        sum = _mm512_fmadd_ps(rest, rest, sum);
    }
    if (i < dim) {
        const __m512 numbers = _mm512_sub_ps(_mm512_load_ps(units + i), shifts);
        const __m512 rest = _mm512_fnmadd_ps(table.nearest(numbers, change), ratios, numbers);
        sum = _mm512_mask3_fmadd_ps(rest, rest, sum, lanes_left16(dim - i));
    }
    return _mm512_reduce_add_ps(sum);
}

template <class Table>
KVCFG_INLINE void write_codes(const Table& table, const float* units, int64_t dim, uint8_t* to) {
    for (int64_t i = 0; i < dim; i += 16) {
        const __m128i bytes = _mm512_cvtepi32_epi8(table.codes(_mm512_load_ps(units + i)));
        if (i + 16 <= dim) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), bytes);
        } else {
            _mm_mask_storeu_epi8(to + i, lanes_left16(dim - i), bytes);
        }
    }
}

class Avx512Loops {
  public:
    explicit Avx512Loops(const Levels* table)
        : many_(*table), few_(*table), whole_(*table), uniform_(table->uniform != 0), fits_(table->count <= 16) {}

    static EncodeTokens encoder(const TokenSide& side) { return avx512_encoder(side); }

    static void bound(float* row, int64_t dim) {
        const __m512 limit = _mm512_set1_ps(float(double(FLT_MAX) / double(4 * dim)));
        const __m512 least = _mm512_sub_ps(_mm512_setzero_ps(), limit);
        for (int64_t i = 0; i < dim; i += 16) {
            _mm512_store_ps(row + i, _mm512_min_ps(limit, _mm512_max_ps(least, _mm512_load_ps(row + i))));
        }
    }

    static void turn(float* row, int64_t dim) { turn_avx512(row, dim); }

    static void times(const float* row, const float* matrix, int64_t dim, float* product) {
        for (int64_t j = 0; j < dim; j += 64) {
            __m512 sums[4] = {};
            for (int64_t i = 0; i < dim; ++i) {
                const __m512 factor = _mm512_set1_ps(row[i]);
                for (int part = 0; part < 4; ++part) {
                    const int64_t at = j + 16 * part;
                    const __m512 numbers = _mm512_maskz_loadu_ps(lanes_left16(dim - at), matrix + i * dim + at);
                    sums[part] = _mm512_fmadd_ps(factor, numbers, sums[part]);
                }
            }
            for (int part = 0; part < 4; ++part) {
                _mm512_mask_storeu_ps(product + j + 16 * part, lanes_left16(dim - j - 16 * part), sums[part]);
            }
        }
    }

    static void range(const float* row, int64_t dim, bool asymmetric, float* low, float* high) {
        __m512 least = _mm512_set1_ps(INFINITY), most = _mm512_set1_ps(asymmetric ? -INFINITY : 0.0f);
        __mmask16 nan = 0;
        for (int64_t i = 0; i < dim; i += 16) {
            const __mmask16 mask = lanes_left16(dim - i);
            const __m512 any = _mm512_load_ps(row + i), numbers = asymmetric ? any : _mm512_abs_ps(any);
            nan |= _mm512_mask_cmp_ps_mask(mask, any, any, _CMP_UNORD_Q);
            least = _mm512_mask_min_ps(least, mask, least, numbers);
            most = _mm512_mask_max_ps(most, mask, most, numbers);
        }
        *low = !asymmetric ? 0.0f : nan ? NAN : _mm512_reduce_min_ps(least);
        *high = nan ? NAN : _mm512_reduce_max_ps(most);
    }

    static void stored(float* scales, int64_t, int64_t type, float largest, float of_zeros) {
        _mm512_store_ps(scales, stored_scales(_mm512_load_ps(scales), type, largest, of_zeros));
    }

    static void in_units(const float* row, int64_t dim, float zero, float unit, float* to) {
        const __m512 zeros = _mm512_set1_ps(zero), divisor = _mm512_set1_ps(unit);
        for (int64_t i = 0; i < dim; i += 16) {
            _mm512_store_ps(to + i, _mm512_div_ps(_mm512_sub_ps(_mm512_load_ps(row + i), zeros), divisor));
        }
    }

    float error(const float* units, int64_t dim, float ratio, float shift) const {
        return uniform_ ? squared_error(whole_, units, dim, ratio, shift)
                        : squared_error(few_, units, dim, ratio, shift);
    }

    void codes(const float* units, int64_t dim, uint8_t* to) const {
        if (uniform_) {
            write_codes(whole_, units, dim, to);
        } else if (fits_) {
            write_codes(few_, units, dim, to);
        } else {
            write_codes(many_, units, dim, to);
        }
    }

  private:
    const ManyLevels many_;
    const FewLevels few_;
    const WholeNumbers whole_;
    const bool uniform_, fits_;
};

void close_one(const CloseCall& call, int64_t page, bool values) { Closing<Avx512Loops>(call, page, values).close(); }

}  // namespace

CloseOne avx512_closer() { return close_one; }

}  // namespace kvcfg

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace kvcfg {
CloseOne avx512_closer() { return nullptr; }
}  // namespace kvcfg

#endif
