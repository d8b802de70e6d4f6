// Stores tokens one by one: the work is split over tokens, and each is encoded by the loop that its format needs.

#include "append.h"

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")  // nobody asks for floating-point exceptions, and loops become vectors
#endif

#include "append_numbers.h"
#include "append_turn.h"
#include "instructions.h"
#include "parallel.h"

namespace kvcfg {
namespace {

constexpr int64_t kTile = 32;               // tokens whose keys, then values, are encoded together
constexpr int64_t kNumbersAPiece = 1 << 15;  // below this, waking a thread takes longer than the work

void read_numbers(const uint8_t* from, int64_t type, int64_t count, float* to) {
    if (type == kFloat32) {
        memcpy(to, from, size_t(count) * 4);
        return;
    }
    if (type == kBFloat16) {
        for (int64_t i = 0; i < count; ++i) {
            uint16_t bits;
            memcpy(&bits, from + 2 * i, 2);
            to[i] = from_bfloat16(bits);
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        uint16_t bits;
        memcpy(&bits, from + 2 * i, 2);
        to[i] = from_float16(bits);
    }
}

void write_cast(const float* numbers, int64_t count, int64_t format, bool bound, uint8_t* to) {
    const float limit = largest_number(format);
    for (int64_t i = 0; i < count; ++i) {
        const float number = bound ? bounded(numbers[i], limit) : numbers[i];
        if (format == kFloat32) {
            memcpy(to + 4 * i, &number, 4);
        } else {
            const uint16_t bits = format == kBFloat16 ? to_bfloat16(number) : to_float16(number);
            memcpy(to + 2 * i, &bits, 2);
        }
    }
}

// The format is known as this is compiled, so that the loop is made of vectors.
template <int64_t Format>
int64_t write_elements(const float* numbers, int64_t count, float scale, uint8_t* to) {
    const float limit = largest_number(Format);
    int32_t beyond = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float exact = numbers[i] / scale, number = bounded(exact, limit);
        beyond += magnitude(exact) > limit ? 1 : 0;
        to[i] = Format == kInt8 ? uint8_t(to_int8(number)) : Format == kE4M3 ? to_e4m3(number) : to_e5m2(number);
    }
    return beyond;
}

int64_t write_scaled(const float* numbers, int64_t count, int64_t format, float scale, uint8_t* to) {
    if (format == kInt8) return write_elements<kInt8>(numbers, count, scale, to);
    if (format == kE4M3) return write_elements<kE4M3>(numbers, count, scale, to);
    return write_elements<kE5M2>(numbers, count, scale, to);
}

int64_t encode_token(const TokenSide& side, const TokenPlace& place) {
    const SideLayout& layout = *side.layout;
    const int64_t dim = layout.dim, type = layout.scale_type;
    const bool casts = layout.format <= kBFloat16;
    const float largest = largest_number(layout.format);
    float row[kMostNumbers];
    int64_t beyond = 0;
    for (int64_t head = 0; head < side.n_heads; ++head) {
        const uint8_t* from = place.numbers + head * side.head_bytes;
        uint8_t* to = place.elements + head * layout.head_bytes;
        if (layout.format == side.number_type && !side.turned) {
            memcpy(to, from, size_t(dim * size_of(layout.format)));
            continue;
        }
        read_numbers(from, side.number_type, dim, row);
        if (side.turned) {
            bound_for_turning(row, dim);
            turn(row, dim);
        }
        if (casts) {
            write_cast(row, dim, layout.format, !(side.turned && layout.format == kFloat32), to);
        } else if (type == kNoScale) {
            beyond += write_scaled(row, dim, layout.format, side.head_scales ? side.head_scales[head] : 1.0f, to);
        } else {
            uint32_t most = 0;  // magnitudes are ordered as their bits, and NaN comes last
            for (int64_t i = 0; i < dim; ++i) {
                const uint32_t bits = bits_of(row[i]) & 0x7FFFFFFF;
                most = bits > most ? bits : most;
            }
            const float scale = stored_scale(float_of(most) / largest, type, largest, 1.0f);
            put_scale(place.scales + head * scale_size(type), scale, type);
            write_scaled(row, dim, layout.format, scale, to);
        }
    }
    return beyond;
}

int64_t encode_plain(const TokenSide& side, const TokenPlace* places, int64_t count) {
    int64_t beyond = 0;
    for (int64_t i = 0; i < count; ++i) beyond += encode_token(side, places[i]);
    return beyond;
}

struct Append {
    const AppendCall& call;
    int64_t piece;
    TokenSide sides[2];
    EncodeTokens encoders[2];
    std::atomic<int64_t> clipped[2];
};

void append_piece(void* context, int64_t item) {
    Append& work = *static_cast<Append*>(context);
    const AppendCall& call = work.call;
    const PageLayout& layout = *call.layout;
    const Incoming* incoming[2] = {&call.keys, &call.values};
    const SideLayout* sides[2] = {&layout.keys, &layout.values};
    const int64_t begin = item * work.piece, number_bytes = size_of(call.number_type);
    const int64_t end = begin + work.piece < call.num_slots ? begin + work.piece : call.num_slots;
    int64_t clipped[2] = {0, 0};
    TokenPlace places[2][kTile];
    for (int64_t i = begin; i < end;) {
        int64_t count = 0;
        for (; i < end && count < kTile; ++i) {
            const int64_t slot = call.slots[i], token = call.rows ? call.rows[i] : i;
            if (slot < 0) continue;
            const int64_t number = slot / layout.page_size, offset = slot - number * layout.page_size;
            uint8_t* page = call.pages + number * call.page_bytes;
            for (int s = 0; s < 2; ++s) {
                const SideLayout& side = *sides[s];
                places[s][count] = {incoming[s]->numbers + token * incoming[s]->stride * number_bytes,
                                    page + side.elements + offset * side.token_bytes,
                                    page + side.scales + offset * layout.n_kv_heads * scale_size(side.scale_type)};
            }
            ++count;
        }
        for (int s = 0; s < 2; ++s) {
            if (work.encoders[s]) clipped[s] += work.encoders[s](work.sides[s], places[s], count);
        }
    }
    for (int s = 0; s < 2; ++s) work.clipped[s] += clipped[s];
}

}  // namespace

EncodeTokens plain_encoder(const TokenSide& side) {
    const int64_t format = side.layout->format;
    const bool known = side.number_type <= kBFloat16 && format <= kInt8 && side.layout->dim <= kMostNumbers;
    return known ? encode_plain : nullptr;
}

}  // namespace kvcfg

extern "C" int kvcfg_append(const kvcfg::AppendCall* call) {
    using namespace kvcfg;
    static const bool wide = has_avx512();
    const PageLayout& layout = *call->layout;
    const SideLayout* sides[2] = {&layout.keys, &layout.values};
    const int64_t head_strides[2] = {call->keys.head_stride, call->values.head_stride};
    Append work{*call, call->num_slots, {}, {}, {{0}, {0}}};
    for (int s = 0; s < 2; ++s) {
        if (!sides[s]->dim) continue;
        const float* scales = call->head_scales ? call->head_scales + s * layout.n_kv_heads : nullptr;
        work.sides[s] = {sides[s], layout.n_kv_heads, call->number_type,
                         head_strides[s] * size_of(call->number_type), layout.turned != 0, scales};
        work.encoders[s] = wide ? avx512_encoder(work.sides[s]) : plain_encoder(work.sides[s]);
        if (!work.encoders[s]) return kNoCode;
    }
    for (int64_t i = 0; i < call->num_slots; ++i) {
        if (call->slots[i] >= call->num_pages * layout.page_size) return kNoSuchSlot;
    }
    const int64_t per_token = layout.n_kv_heads * (layout.keys.dim + layout.values.dim);
    const int64_t most = call->num_slots * per_token / kNumbersAPiece;
    if (call->threads < 2 || most < 2) {
        append_piece(&work, 0);
    } else {
        const int64_t pieces = most < 4 * call->threads ? most : 4 * call->threads;
        work.piece = (call->num_slots + pieces - 1) / pieces;
        parallel_for((call->num_slots + work.piece - 1) / work.piece, call->threads, append_piece, &work);
    }
    for (int s = 0; call->clipped && s < 2; ++s) call->clipped[s] += work.clipped[s];
    return kStored;
}
