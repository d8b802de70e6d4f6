// Closes pages: the work is split over pages and their sides.

#include "close.h"

#include "append_turn.h"
#include "close_core.h"
#include "instructions.h"
#include "parallel.h"

namespace kvcfg {
namespace {

class PlainLoops {
  public:
    explicit PlainLoops(const Levels* table) : table_(table) {}

    static EncodeTokens encoder(const TokenSide& side) { return plain_encoder(side); }
    static void bound(float* row, int64_t dim) { bound_for_turning(row, dim); }
    static void turn(float* row, int64_t dim) { kvcfg::turn(row, dim); }

    static void times(const float* row, const float* matrix, int64_t dim, float* product) {
        for (int64_t j = 0; j < dim; ++j) product[j] = 0;
        for (int64_t i = 0; i < dim; ++i) {
            for (int64_t j = 0; j < dim; ++j) product[j] += row[i] * matrix[i * dim + j];
        }
    }

    // The smallest and largest number, or 0 and the largest magnitude; NaN if there is one.
    static void range(const float* row, int64_t dim, bool asymmetric, float* low, float* high) {
        float least = asymmetric ? row[0] : 0.0f, most = asymmetric ? row[0] : 0.0f;
        bool nan = false;
        for (int64_t i = 0; i < dim; ++i) {
            const float number = asymmetric ? row[i] : magnitude(row[i]);
            least = number < least ? number : least;
            most = number > most ? number : most;
            nan |= number != number;
        }
        *low = asymmetric && nan ? NAN : least;
        *high = nan ? NAN : most;
    }

    static void stored(float* scales, int64_t count, int64_t type, float largest, float of_zeros) {
        for (int64_t i = 0; i < count; ++i) scales[i] = stored_scale(scales[i], type, largest, of_zeros);
    }

    static void in_units(const float* row, int64_t dim, float zero, float unit, float* to) {
        for (int64_t i = 0; i < dim; ++i) to[i] = (row[i] - zero) / unit;
    }

    float error(const float* units, int64_t dim, float ratio, float shift) const {
        const float inverse = 1.0f / ratio;
        float sum = 0;
        for (int64_t i = 0; i < dim; ++i) {
            const float number = units[i] - shift;
            const float rest = number - table_->levels[nearest(number * inverse)] * ratio;
            sum += rest * rest;
        }
        return sum;
    }

    void codes(const float* units, int64_t dim, uint8_t* to) const {
        for (int64_t i = 0; i < dim; ++i) to[i] = uint8_t(table_->codes[nearest(units[i])]);
    }

  private:
    // Which level, counted from the lowest; NaN goes to the first one, or to 0 where levels are whole numbers.
    int nearest(float number) const {
        const Levels& table = *table_;
        if (table.uniform != 0) {
            const int zero = int(-table.levels[0]), last = int(table.count) - 1;
            if (number != number) return zero;
            const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
            const float place = (bounded(number, 128.0f) + shift) - shift - table.levels[0];
            return place < 0 ? 0 : place > float(last) ? last : int(place);
        }
        const float cell = (number - table.low) * table.cells_per_unit;
        const float within = cell > 0 ? (cell < 8191.0f ? cell : 8191.0f) : 0.0f;
        int level = int(table.guess[int(within) >> 5]);
        while (within >= table.edges[level]) ++level;
        return level;
    }

    const Levels* table_;
};

struct Work {
    const CloseCall& call;
    CloseOne close;
};

void close_item(void* context, int64_t item) {
    const Work& work = *static_cast<Work*>(context);
    const bool values = item % 2;
    if ((values ? work.call.values : work.call.keys).dim) work.close(work.call, item / 2, values);
}

bool is_known(const CloseSide& side) {
    if (!side.dim) return true;
    if (side.dim > kMostNumbers || side.scale_type == kNoScale) return false;
    return side.format <= kInt8 ? side.format >= kE4M3 : side.levels != nullptr && side.num_narrower < 16;
}

bool is_read(const PageLayout& layout) { return layout.keys.format <= kInt8 && layout.values.format <= kInt8; }

}  // namespace

CloseOne plain_closer() {
    return [](const CloseCall& call, int64_t page, bool values) { Closing<PlainLoops>(call, page, values).close(); };
}

}  // namespace kvcfg

extern "C" int kvcfg_close(const kvcfg::CloseCall* call) {
    using namespace kvcfg;
    static const bool wide = has_avx512();
    if (!is_known(call->keys) || !is_known(call->values)) return 1;
    if (!is_read(*call->open.layout) || !is_read(*call->fresh.layout)) return 1;
    Work work{*call, wide ? avx512_closer() : plain_closer()};
    parallel_for(2 * call->num_pages, call->threads, close_item, &work);
    return 0;
}
