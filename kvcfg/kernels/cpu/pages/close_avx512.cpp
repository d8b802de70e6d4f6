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

// At most 16 levels looked up in registers: 32 bins of 256 cells, each with one edge in it at most.
class FewLevels {
  public:
    explicit FewLevels(const Levels& table)
        : levels_(_mm512_loadu_ps(table.levels)), factor_(_mm512_set1_ps(table.cells_per_unit)),
          offset_(_mm512_set1_ps(-table.low * table.cells_per_unit)) {
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

    __m512 nearest(__m512 numbers) const {
        const __m512 any = _mm512_fmadd_ps(numbers, factor_, offset_);
        const __m512 cells = _mm512_min_ps(_mm512_max_ps(any, _mm512_setzero_ps()), _mm512_set1_ps(8191.0f));
        const __m512i bins = _mm512_srli_epi32(_mm512_cvttps_epi32(cells), 8);
        const __m512 edges = _mm512_permutex2var_ps(edges_[0], bins, edges_[1]);
        const __m512i below = _mm512_permutex2var_epi32(guesses_[0], bins, guesses_[1]);
        const __mmask16 above = _mm512_cmp_ps_mask(cells, edges, _CMP_GE_OQ);
        return _mm512_permutexvar_ps(_mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1)), levels_);
    }

  private:
    __m512 levels_, factor_, offset_, edges_[2];
    __m512i guesses_[2];
};

class WholeNumbers {
  public:
    explicit WholeNumbers(const Levels& table)
        : low_(_mm512_set1_ps(table.levels[0])), high_(_mm512_set1_ps(table.levels[int(table.count) - 1])) {}

    __m512 nearest(__m512 numbers) const {
        const __m512 whole = _mm512_roundscale_ps(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        return _mm512_min_ps(high_, _mm512_max_ps(low_, whole));
    }

  private:
    __m512 low_, high_;
};

template <class Table>
float squared_error(const Table& table, const float* units, int64_t dim, float ratio, float shift) {
    const __m512 ratios = _mm512_set1_ps(ratio), inverse = _mm512_set1_ps(1.0f / ratio), shifts = _mm512_set1_ps(shift);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 numbers = _mm512_sub_ps(_mm512_load_ps(units + i), shifts);
        const __m512 rest = _mm512_fnmadd_ps(table.nearest(_mm512_mul_ps(numbers, inverse)), ratios, numbers);
        sum = _mm512_mask3_fmadd_ps(rest, rest, sum, lanes_left16(dim - i));
    }
    return _mm512_reduce_add_ps(sum);
}

struct Avx512Loops {
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

    static float error(const float* units, int64_t dim, float ratio, float shift, const Levels& table) {
        if (table.uniform != 0) return squared_error(WholeNumbers(table), units, dim, ratio, shift);
        return squared_error(FewLevels(table), units, dim, ratio, shift);
    }

    static void codes(const float* units, int64_t dim, const Levels& table, uint8_t* to) {
        const __m512 low = _mm512_set1_ps(table.uniform != 0 ? table.levels[0] : table.low);
        const __m512 factor = _mm512_set1_ps(table.cells_per_unit);
        const __m512 last = _mm512_set1_ps(table.count - 1);
        for (int64_t i = 0; i < dim; i += 16) {
            const __m512 numbers = _mm512_load_ps(units + i);
            __m512i codes;
            if (table.uniform != 0) {
                const __m512 whole = _mm512_roundscale_ps(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
                const __m512 places = _mm512_max_ps(_mm512_setzero_ps(), _mm512_sub_ps(whole, low));
                const __m512i zero = _mm512_cvtps_epi32(_mm512_sub_ps(_mm512_setzero_ps(), low));
                codes = _mm512_mask_mov_epi32(_mm512_cvtps_epi32(_mm512_min_ps(places, last)), nan, zero);
            } else {
                const __m512 any = _mm512_mul_ps(_mm512_sub_ps(numbers, low), factor);
                const __m512 cells = _mm512_min_ps(_mm512_max_ps(any, _mm512_setzero_ps()), _mm512_set1_ps(8191.0f));
                const __m512i bins = _mm512_srli_epi32(_mm512_cvttps_epi32(cells), 5);
                const __m512i below = _mm512_cvtps_epi32(_mm512_i32gather_ps(bins, table.guess, 4));
                const __m512 edges = _mm512_i32gather_ps(below, table.edges, 4);
                const __mmask16 above = _mm512_cmp_ps_mask(cells, edges, _CMP_GE_OQ);
                const __m512i level = _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1));
                codes = _mm512_cvtps_epi32(_mm512_i32gather_ps(level, table.codes, 4));
            }
            _mm_mask_storeu_epi8(to + i, lanes_left16(dim - i), _mm512_cvtepi32_epi8(codes));
        }
    }
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
