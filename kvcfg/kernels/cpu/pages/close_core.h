// A page from its tokens: read, centred, turned, scaled and packed. `Loops` does what is done to many numbers; a file
// that includes this brings its own.

#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "append_numbers.h"
#include "close.h"
#include "close_packing.h"

namespace kvcfg {
namespace {

inline const float* e4m3_table() {
    static const struct Table {
        float numbers[256];
        Table() {
            for (int code = 0; code < 256; ++code) {
                const int exponent = code >> 3 & 15, mantissa = code & 7;
                const float magnitude = exponent ? std::ldexp(8.0f + float(mantissa), exponent - 10)
                                                 : std::ldexp(float(mantissa), -9);
                const float number = (code & 0x7F) == 0x7F ? NAN : magnitude;
                numbers[code] = code & 0x80 ? -number : number;
            }
        }
    } table;
    return table.numbers;
}

inline float scale_at(const uint8_t* from, int64_t type) {
    if (type == kNoScale) return 1.0f;
    if (type == kScaleFloat32) {
        float scale;
        memcpy(&scale, from, 4);
        return scale;
    }
    uint16_t bits;
    memcpy(&bits, from, 2);
    return type == kScaleFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

inline void read_head(const uint8_t* from, int64_t format, int64_t dim, float scale, float* to) {
    switch (format) {
        case kInt8:
            for (int64_t i = 0; i < dim; ++i) to[i] = float(int8_t(from[i])) * scale;
            break;
        case kBFloat16:
            for (int64_t i = 0; i < dim; ++i) {
                uint16_t bits;
                memcpy(&bits, from + 2 * i, 2);
                to[i] = from_bfloat16(bits);
            }
            break;
        case kFloat16:
            for (int64_t i = 0; i < dim; ++i) {
                uint16_t bits;
                memcpy(&bits, from + 2 * i, 2);
                to[i] = from_float16(bits);
            }
            break;
        case kFloat32: memcpy(to, from, size_t(dim) * 4); break;
        case kE4M3: {
            const float* table = e4m3_table();
            for (int64_t i = 0; i < dim; ++i) to[i] = table[from[i]] * scale;
            break;
        }
        default:
            for (int64_t i = 0; i < dim; ++i) to[i] = from_float16(uint16_t(from[i] << 8)) * scale;
    }
}

// The number itself, which keeps compilers from joining the product it is with a sum that follows.
inline float rounded(float number) {
    asm("" : "+m"(number));
    return number;
}

// Memory that a thread keeps from page to page. Not a std::vector, whose code must not be compiled with the options of
// one file and then be shared with the others.
class Buffer {
  public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    void* at_least(size_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = (bytes + 63) / 64 * 64;
            data_ = std::aligned_alloc(64, size_);
            if (!data_) std::abort();
        }
        return data_;
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

// One side of a page on its way.
template <class Loops>
class Closing {
  public:
    Closing(const CloseCall& call, int64_t page, bool values)
        : call_(call), side_(values ? call.values : call.keys), page_(page), values_(values),
          heads_(call.n_kv_heads), dim_(side_.dim), own_(call.page_size - call.sink_tokens),
          room_((dim_ + 15) / 16 * 16) {
        static thread_local Buffer numbers, codes;
        const size_t count = size_t(call.page_size * heads_ * room_);
        rows_ = static_cast<float*>(numbers.at_least(4 * count));
        codes_ = static_cast<uint8_t*>(codes.at_least(count));
    }

    void close() {
        uint8_t* page = call_.pages + call_.page_ids[page_] * call_.page_bytes;
        uint8_t* elements = page + side_.elements;
        uint8_t* scales = page + side_.scales;
        const int64_t scale_bytes = scale_size(side_.scale_type), count = own_ * heads_;
        uint8_t* zeros = scales + count * scale_bytes;
        uint8_t* means = zeros + (side_.asymmetric ? count * scale_bytes : 0);
        uint8_t* sinks = means + (side_.centred ? heads_ * dim_ * scale_bytes : 0);
        read();
        put_sinks(sinks, sinks + call_.sink_tokens * heads_ * dim_);
        if (side_.centred) centre(means);
        if (side_.matrices) {
            times_matrices();
        } else if (side_.turned && !turned_) {
            turn_from(call_.sink_tokens);
        }
        if (side_.format <= kInt8) {
            put_eight_bits(elements, scales);
            return;
        }
        const Loops loops(side_.levels);
        const float of_zeros = has_zero() ? 1.0f : 0.0f;
        for (int64_t i = 0; i < count; ++i) {
            encode(loops, of_zeros, i, scales + i * scale_bytes, zeros + i * scale_bytes);
        }
        pack(codes_, count * dim_, int(side_.bits), elements);
    }

  private:
    float* row(int64_t token, int64_t head) { return rows_ + (token * heads_ + head) * room_; }

    // Open pages may be turned already, and then numbers stay so unless matrices take the place of Hadamard's.
    void read() {
        turned_ = call_.open.layout->turned != 0;
        for (int64_t token = 0; token < call_.page_size; ++token) {
            const int64_t place = call_.places[page_ * call_.page_size + token];
            const OpenPages& from = place < 0 ? call_.fresh : call_.open;
            const int64_t slot = place < 0 ? -1 - place : place;
            const SideLayout& layout = values_ ? from.layout->values : from.layout->keys;
            const uint8_t* page = from.pages + slot / from.layout->page_size * from.page_bytes;
            const int64_t offset = slot % from.layout->page_size;
            const uint8_t* scales = page + layout.scales + offset * heads_ * scale_size(layout.scale_type);
            for (int64_t head = 0; head < heads_; ++head) {
                const float scale = scale_at(scales + head * scale_size(layout.scale_type), layout.scale_type);
                float* to = row(token, head);
                read_head(page + layout.elements + offset * layout.token_bytes + head * layout.head_bytes,
                          layout.format, dim_, scale, to);
                for (int64_t i = dim_; i < room_; ++i) to[i] = 0.0f;
            }
        }
    }

    void put_sinks(uint8_t* elements, uint8_t* scales) {
        if (!call_.sink_tokens) return;
        put_tokens(0, call_.sink_tokens, kInt8, kScaleFloat16, !turned_, elements, scales);
    }

    void put_eight_bits(uint8_t* elements, uint8_t* scales) {
        put_tokens(call_.sink_tokens, own_, side_.format, side_.scale_type, false, elements, scales);
    }

    void put_tokens(int64_t first, int64_t count, int64_t format, int64_t scale_type, bool turns, uint8_t* elements,
                    uint8_t* scales) {
        const SideLayout layout{format, dim_, 0, heads_ * dim_, dim_, 0, scale_type, -1, -1, -1, -1};
        const TokenSide side{&layout, heads_, kFloat32, room_ * 4, turns, nullptr};
        const EncodeTokens encoder = Loops::encoder(side);
        for (int64_t i = 0; i < count; ++i) {
            const TokenPlace place{reinterpret_cast<uint8_t*>(row(first + i, 0)), elements + i * heads_ * dim_,
                                   scales + i * heads_ * scale_size(scale_type)};
            encoder(side, &place, 1);
        }
    }

    void turn_from(int64_t first) {
        for (int64_t i = first * heads_; i < call_.page_size * heads_; ++i) {
            if (!turned_) Loops::bound(rows_ + i * room_, dim_);
            Loops::turn(rows_ + i * room_, dim_);
        }
    }

    // Takes away the mean of tokens that are no sinks. What is not finite has no part in it.
    void centre(uint8_t* to) {
        const int64_t size = scale_size(side_.scale_type);
        const float limit = side_.scale_type == kScaleFloat16    ? 65504.0f
                            : side_.scale_type == kScaleBFloat16 ? 0x1.FEp127f
                                                                 : FLT_MAX;
        alignas(64) float mean[kMostNumbers];
        double sums[kMostNumbers];
        int counts[kMostNumbers];
        for (int64_t head = 0; head < heads_; ++head) {
            for (int64_t i = 0; i < dim_; ++i) sums[i] = counts[i] = 0;
            for (int64_t token = call_.sink_tokens; token < call_.page_size; ++token) {
                const float* numbers = row(token, head);
                for (int64_t i = 0; i < dim_; ++i) {
                    const bool finite = magnitude(numbers[i]) <= FLT_MAX;
                    sums[i] += finite ? double(numbers[i]) : 0.0;
                    counts[i] += finite;
                }
            }
            for (int64_t i = 0; i < room_; ++i) mean[i] = i < dim_ ? float(sums[i] / (counts[i] ? counts[i] : 1)) : 0;
            if (turned_) Loops::turn(mean, dim_);
            for (int64_t i = 0; i < dim_; ++i) {
                uint8_t* place = to + (head * dim_ + i) * size;
                put_scale(place, bounded(mean[i], limit), side_.scale_type);
                mean[i] = scale_at(place, side_.scale_type);
            }
            if (turned_) Loops::turn(mean, dim_);
            for (int64_t token = call_.sink_tokens; token < call_.page_size; ++token) {
                float* numbers = row(token, head);
                for (int64_t i = 0; i < dim_; ++i) numbers[i] -= mean[i];
            }
        }
    }

    void times_matrices() {
        if (turned_) turn_from(call_.sink_tokens);
        alignas(64) float product[kMostNumbers];
        for (int64_t head = 0; head < heads_; ++head) {
            const float* matrix = side_.matrices + head * dim_ * dim_;
            for (int64_t token = call_.sink_tokens; token < call_.page_size; ++token) {
                float* numbers = row(token, head);
                Loops::bound(numbers, dim_);
                Loops::times(numbers, matrix, dim_, product);
                memcpy(numbers, product, size_t(dim_) * 4);
            }
        }
    }

    // Codes of one head of one token, with the scale, and zero, that has the least squared error.
    void encode(const Loops& loops, float of_zeros, int64_t index, uint8_t* scale_to, uint8_t* zero_to) {
        const float largest = float(side_.largest);
        const int64_t count = 1 + side_.num_narrower, type = side_.scale_type;
        float* numbers = rows_ + (call_.sink_tokens * heads_ + index) * room_;
        alignas(64) float scales[16], zeros[16] = {}, units[kMostNumbers];
        float low = 0, high;
        Loops::range(numbers, dim_, side_.asymmetric != 0, &low, &high);
        for (int64_t k = 0; k < count; ++k) {
            const double part = k ? side_.narrower[k - 1] : 1.0;
            if (side_.asymmetric) {
                const float cut = k ? rounded((high - low) * float((1.0 - part) / 2)) : 0.0f;
                zeros[k] = zero_of(low + cut);
                const float span = high - cut - zeros[k];
                scales[k] = (span < 0 ? 0.0f : span) / largest;
            } else {
                scales[k] = high * float(part) / largest;
            }
        }
        for (int64_t k = count; k < 16; ++k) scales[k] = 0.0f;
        Loops::stored(scales, count, type, largest, of_zeros);
        int64_t best = 0;
        if (count > 1) {
            const float unit = scales[0] == 0 ? 1.0f : scales[0];
            Loops::in_units(numbers, dim_, zeros[0], unit, units);
            float least = loops.error(units, dim_, 1.0f, 0.0f);
            for (int64_t k = 1; k < count; ++k) {
                const float shift = (zeros[k] - zeros[0]) / unit;
                const float error = loops.error(units, dim_, scales[k] / unit, shift);
                if (error < least) {
                    least = error;
                    best = k;
                }
            }
        }
        put_scale(scale_to, scales[best], type);
        if (side_.asymmetric) put_scale(zero_to, zeros[best], type);
        Loops::in_units(numbers, dim_, zeros[best], scales[best] == 0 ? 1.0f : scales[best], units);
        loops.codes(units, dim_, codes_ + index * dim_);
    }

    // A zero as it will be read.
    float zero_of(float low) const {
        uint8_t bytes[4];
        const float limit = side_.scale_type == kScaleFloat16 ? 65504.0f : FLT_MAX;
        put_scale(bytes, bounded(low, limit), side_.scale_type);
        return scale_at(bytes, side_.scale_type);
    }

    bool has_zero() const {
        const Levels& table = *side_.levels;
        for (int i = 0; i < int(table.count); ++i) {
            if (table.levels[i] == 0) return true;
        }
        return false;
    }

    const CloseCall& call_;
    const CloseSide& side_;
    const int64_t page_;
    const bool values_;
    const int64_t heads_, dim_, own_, room_;  // own_: tokens that are no sinks; room_: from one head to the next
    bool turned_ = false;                     // whether rows are turned by a Hadamard matrix now
    float* rows_;                             // [page_size, n_kv_heads, room_]
    uint8_t* codes_;                          // [own_ * n_kv_heads * dim]
};

}  // namespace
}  // namespace kvcfg
