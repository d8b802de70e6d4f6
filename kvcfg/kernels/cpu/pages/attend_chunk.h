// A chunk: some consecutive tokens of a sequence, found in its pages. Include after lanes.h.

#pragma once

#include "attend.h"
#include "lanes.h"

namespace kvcfg {
namespace {

constexpr int64_t kScores = 144;  // from one row's scores to the next one's: the last group of tokens may run over
constexpr int64_t kChunk = 128;  // tokens; what is made of them for one head fits in the first level of cache

// Keys, or values, of tokens that follow one another in one page.
struct Side {
    const uint8_t* elements;
    const uint8_t* scales;
    const uint8_t* zeros;
    const uint8_t* means;
    int64_t format, scale_type, means_type, token_bytes, head_bytes;
};

// Tokens of a chunk that lie one after the other in one page, stored alike.
struct Piece {
    int64_t begin, count;  // in the chunk
    Side sides[2];         // keys, values
};

struct Chunk {
    int64_t begin, count, num_pieces;  // begin: position of the first token in the sequence
    Piece pieces[kChunk];
};

KVCFG_INLINE int64_t scale_bytes(int64_t type) { return type == kScaleFloat32 ? 4 : 2; }

inline Side stored(const uint8_t* page, const PageLayout& layout, const SideLayout& side, int64_t token) {
    const int64_t own = token - layout.sink_tokens;
    const int64_t scale_row = layout.n_kv_heads * scale_bytes(side.scale_type);
    return {page + side.elements + own * side.token_bytes,
            side.scale_type == kNoScale ? nullptr : page + side.scales + own * scale_row,
            side.zeros < 0 ? nullptr : page + side.zeros + own * scale_row,
            side.means < 0 ? nullptr : page + side.means,
            side.format, side.scale_type, side.scale_type, side.token_bytes, side.head_bytes};
}

inline Side stored_sink(const uint8_t* page, const PageLayout& layout, const SideLayout& side, int64_t token) {
    return {page + side.sinks + token * layout.n_kv_heads * side.dim,
            page + side.sink_scales + token * layout.n_kv_heads * 2,
            nullptr, nullptr, kInt8, kScaleFloat16, kNoScale, layout.n_kv_heads * side.dim, side.dim};
}

KVCFG_INLINE int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
KVCFG_INLINE int64_t more(int64_t a, int64_t b) { return a > b ? a : b; }

// Where tokens [begin, end) of a sequence lie.
inline void find_tokens(const AttendCall& call, int64_t sequence, int64_t begin, int64_t end, Chunk& chunk) {
    chunk.begin = begin;
    chunk.count = end - begin;
    chunk.num_pieces = 0;
    const int32_t* table = call.tables + sequence * call.table_stride;
    for (int64_t token = begin; token < end;) {
        const bool open = call.open_pages != nullptr && token >= call.closed[sequence];
        const PageLayout& layout = open ? *call.open_layout : *call.layout;
        const int64_t slot = open ? token % call.ring_tokens : token;
        const int64_t number = slot / layout.page_size, place = slot % layout.page_size;
        const uint8_t* page = open ? call.open_pages + (call.open_rows[sequence] + number) * call.open_page_bytes
                                   : call.pages + table[number % call.table_columns] * call.page_bytes;
        const bool sink = place < layout.sink_tokens;
        int64_t count = less((sink ? layout.sink_tokens : layout.page_size) - place, end - token);
        if (call.open_pages != nullptr && !open) count = less(count, call.closed[sequence] - token);
        Piece& piece = chunk.pieces[chunk.num_pieces++];
        piece.begin = token - begin;
        piece.count = count;
        const SideLayout* sides[2] = {&layout.keys, &layout.values};
        for (int side = 0; side < 2; ++side) {
            piece.sides[side] = sink ? stored_sink(page, layout, *sides[side], place)
                                     : stored(page, layout, *sides[side], place);
        }
        token += count;
    }
}

// Asks for the bytes of a chunk, a few lines at a time, in the order in which they lie: memory delivers them while
// the chunk before is worked on.
class Ahead {
public:
    // The chunk, and how often `some` of its streams will be called about.
    void follow(const Chunk& chunk, int64_t calls) {
        chunk_ = &chunk;
        number_ = -1;
        side_ = 1;
        in_side_ = done_ = lines_ = 0;
        for (int64_t number = 0; number < chunk.num_pieces; ++number) {
            for (const Side& side : chunk.pieces[number].sides) lines_ += lines_of(chunk.pieces[number], side);
        }
        a_call_ = (lines_ + calls - 1) / calls;
    }

    void rest() { a_call_ = lines_ = done_ = 0; }

    // What a loop asks for: lines one after the other, without a call, so that its registers stay where they are.
    struct Stream {
        const uint8_t* at;
        int64_t lines;
        KVCFG_INLINE void some() {
            for (int64_t line = 0; line < lines; ++line, at += 64) __builtin_prefetch(at, 0, 2);
        }
    };

    // The next lines for so many calls of `some`. A stream may run past its side of a piece, which does no harm.
    Stream stream(int64_t calls) {
        if (done_ >= lines_ || (in_side_ == 0 && !next())) return {nullptr, 0};
        const Stream taken = {at_, a_call_};
        const int64_t count = less(a_call_ * calls, in_side_);
        at_ += count * 64;
        in_side_ -= count;
        done_ += count;
        return taken;
    }

    // What is missing until `part` of `parts` are there.
    void until(int64_t part, int64_t parts) { fetch(lines_ * part / parts - done_); }

private:
    static int64_t lines_of(const Piece& piece, const Side& side) { return (piece.count * side.token_bytes + 63) / 64; }

    KVCFG_INLINE void fetch(int64_t count) {
        for (int64_t line = 0; line < count; ++line) {
            if (in_side_ == 0 && !next()) return;
            __builtin_prefetch(at_, 0, 2);
            at_ += 64;
            --in_side_;
            ++done_;
        }
    }

    bool next() {
        if (number_ + (side_ == 1) >= chunk_->num_pieces) return false;
        number_ += side_ == 1;
        side_ ^= 1;
        const Piece& piece = chunk_->pieces[number_];
        at_ = piece.sides[side_].elements;
        in_side_ = lines_of(piece, piece.sides[side_]);
        return in_side_ > 0;
    }

    const Chunk* chunk_ = nullptr;
    const uint8_t* at_ = nullptr;
    int64_t number_ = -1, side_ = 1, in_side_ = 0, done_ = 0, lines_ = 0, a_call_ = 0;
};

KVCFG_INLINE float one_scale(const uint8_t* from, int64_t type) {
    uint32_t bits = 0;
    float number;
    if (type == kScaleFloat32) {
        memcpy(&number, from, 4);
        return number;
    }
    uint16_t half;
    memcpy(&half, from, 2);
    if (type == kScaleBFloat16) {
        bits = static_cast<uint32_t>(half) << 16;
        memcpy(&number, &bits, 4);
        return number;
    }
    return from_float16(Halves{} + half)[0];
}

// Stored scales, zeros or means to float32.
inline void read_scales(const uint8_t* from, int64_t type, int64_t count, float* to) {
    if (type == kScaleFloat32) {
        memcpy(to, from, count * 4);
        return;
    }
    int64_t done = 0;
    for (; done + 16 <= count; done += 16) {
        const Halves bits = load<Halves>(from + done * 2);
        store(to + done, type == kScaleFloat16 ? from_float16(bits) : from_bfloat16(bits));
    }
    for (; done < count; ++done) to[done] = one_scale(from + done * 2, type);
}

}  // namespace
}  // namespace kvcfg
