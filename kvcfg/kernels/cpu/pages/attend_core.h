// Attention of an item: chunk after chunk of its tokens, and for every KV head of a chunk
//
//     score   rows times keys
//     soften  scores to weights: the softmax of a row so far (Milakov and Gimelshein 2018, online softmax)
//     weigh   weights times values, added to what earlier chunks gave
//
// so that pages are read once, in the order in which they lie, and everything else stays in the caches. A Math says in
// which numbers products are taken, and whether stored rows are first packed in the order of the products, which pays
// where many rows share them. Include after the pragma that chooses an instruction set.

#pragma once

#include "attend_chunk.h"
#include "turn.h"

namespace kvcfg {
namespace {

KVCFG_INLINE int64_t round_up(int64_t number, int64_t unit) { return (number + unit - 1) / unit * unit; }

constexpr int64_t kFewRows = 8;  // up to so many rows take keys and values as they are stored

// An item's buffers in its thread's scratch memory.
template <class Math>
struct Work {
    const AttendCall& call;
    const Item& item;
    int64_t rows, heads, group, key_dim, value_dim, width;  // rows: of one head; width: numbers of a row's sums
    uint8_t* constants;    // what Math makes of the call
    uint8_t* queries;      // [heads * rows] as Math takes them
    float* exact_queries;  // [heads * rows, key_dim] before they are turned, where keys are stored less a mean
    float* query_sums;     // [heads * rows] where keys have zeros
    float* most;           // [heads * rows] largest score so far
    float* total;          // [heads * rows] sum of weights
    float* shift;          // [heads * rows] what zeros of values add
    float* sums;           // [heads * rows, width] weighted values
    float* scores;         // [rows, kScores]
    float* corrections;    // [rows] what sums so far are multiplied by
    uint8_t* weights;      // [rows] as Math takes them
    float* weight_scales;  // [rows]
    uint8_t* packed;       // keys, then values, of one head of a chunk
    float* scales;         // [4, kChunk, n_kv_heads]: of keys, of values, zeros of keys, of values
    float* of_head;        // [4, kChunk] those of one head
    float* inverse;        // [kChunk] of the scales of its values, where Math rounds weights
    float* one_row;        // [max dim]
    uint8_t* nothing;      // a row of zeros in place of tokens past the end
    Chunk* chunks;         // [2] this one and the next
    int64_t bytes;
    Ahead ahead;           // brings the next chunk near
    float factor;          // what a product of query and key is multiplied by

    Work(const AttendCall& call, const Item& item, uint8_t* scratch) : call(call), item(item) {
        const PageLayout& layout = *call.layout;
        rows = rows_of(call, item);
        heads = item.head_end - item.head_begin;
        group = group_of(call);
        key_dim = layout.keys.dim;
        value_dim = layout.values.dim;
        width = round_up(value_dim, 64);
        factor = static_cast<float>(call.softcap > 0 ? call.scale / call.softcap : call.scale * kLog2E);
        const int64_t all_rows = heads * rows, widest = round_up(more(key_dim, value_dim), 64);
        bytes = 0;
        constants = take<uint8_t>(scratch, Math::kConstantBytes);
        queries = take<uint8_t>(scratch, all_rows * Math::query_bytes(key_dim));
        exact_queries = take<float>(scratch, layout.keys.means < 0 ? 0 : all_rows * key_dim);
        query_sums = take<float>(scratch, all_rows);
        most = take<float>(scratch, all_rows);
        total = take<float>(scratch, all_rows);
        shift = take<float>(scratch, all_rows);
        sums = take<float>(scratch, all_rows * width);
        scores = take<float>(scratch, rows * kScores);
        corrections = take<float>(scratch, rows);
        weights = take<uint8_t>(scratch, rows * Math::kWeightBytes);
        weight_scales = take<float>(scratch, rows);
        packed = take<uint8_t>(scratch, kChunk * widest * Math::kPackedBytes);
        scales = take<float>(scratch, 4 * kChunk * layout.n_kv_heads);
        of_head = take<float>(scratch, 4 * kChunk);
        inverse = take<float>(scratch, kChunk);
        one_row = take<float>(scratch, 2 * widest);
        nothing = take<uint8_t>(scratch, widest * 4 + 64);
        chunks = take<Chunk>(scratch, 2);
    }

    template <class Item_>
    Item_* take(uint8_t* scratch, int64_t count) {
        Item_* place = reinterpret_cast<Item_*>(scratch + bytes);
        bytes = round_up(bytes + count * static_cast<int64_t>(sizeof(Item_)), 64);
        return place;
    }
};

inline void read_query(const AttendCall& call, int64_t query, int64_t head, int64_t dim, float* row) {
    const int64_t start = query * call.query_stride + head * call.query_head_stride;
    if (call.query_type == kFloat32) {
        memcpy(row, static_cast<const float*>(call.queries) + start, dim * sizeof(float));
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(call.queries) + start;
    for (int64_t i = 0; i < dim; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
        memcpy(row + i, &bits, 4);
    }
}

template <class Math>
void prepare_queries(Work<Math>& work) {
    const AttendCall& call = work.call;
    const int64_t dim = work.key_dim;
    for (int64_t head = 0; head < work.heads; ++head) {
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t place = head * work.rows + row;
            const int64_t query_head = (work.item.head_begin + head) * work.group + row % work.group;
            float* query = work.one_row;
            read_query(call, work.item.query_begin + row / work.group, query_head, dim, query);
            if (call.layout->keys.means >= 0) {
                for (int64_t i = 0; i < dim; ++i) work.exact_queries[place * dim + i] = query[i] * work.factor;
            }
            if (call.layout->turned) turn(query, dim);
            if (call.layout->keys.zeros >= 0) {
                float sum_of_row = 0;
                for (int64_t i = 0; i < dim; ++i) sum_of_row += query[i];
                work.query_sums[place] = sum_of_row * work.factor;
            }
            Math::take_query(call, query, dim, work.queries + place * Math::query_bytes(dim));
            work.most[place] = kMinusInfinity;
            work.total[place] = work.shift[place] = 0;
        }
    }
    memset(work.sums, 0, work.heads * work.rows * work.width * sizeof(float));
}

// Scales and zeros of a chunk for all heads.
template <class Math>
void read_chunk_scales(Work<Math>& work, const Chunk& chunk) {
    const int64_t n_heads = work.call.layout->n_kv_heads;
    for (int64_t number = 0; number < chunk.num_pieces; ++number) {
        const Piece& piece = chunk.pieces[number];
        for (int side = 0; side < 2; ++side) {
            const Side& part = piece.sides[side];
            float* scales = work.scales + (side * kChunk + piece.begin) * n_heads;
            float* zeros = scales + 2 * kChunk * n_heads;
            const float unit = Math::unit_of(work.constants, part.format, side);
            if (part.scales != nullptr) {
                read_scales(part.scales, part.scale_type, piece.count * n_heads, scales);
                for (int64_t i = 0; unit != 1.0f && i < piece.count * n_heads; ++i) scales[i] *= unit;
            } else {
                const float* fixed = work.call.head_scales;
                for (int64_t i = 0; i < piece.count * n_heads; ++i) {
                    scales[i] = unit * (fixed == nullptr ? 1.0f : fixed[side * n_heads + i % n_heads]);
                }
            }
            if (work.call.layout->keys.zeros < 0 && work.call.layout->values.zeros < 0) continue;
            if (part.zeros != nullptr) {
                read_scales(part.zeros, part.scale_type, piece.count * n_heads, zeros);
            } else {
                memset(zeros, 0, piece.count * n_heads * sizeof(float));
            }
        }
    }
}

// Those of one head, times a factor; past the end of the chunk zero.
template <class Math>
void pick_head(Work<Math>& work, const Chunk& chunk, int64_t head, int part, float factor) {
    const int64_t n_heads = work.call.layout->n_kv_heads;
    const float* from = work.scales + part * kChunk * n_heads + head;
    float* to = work.of_head + part * kChunk;
    for (int64_t token = 0; token < chunk.count; ++token) to[token] = from[token * n_heads] * factor;
    for (int64_t token = chunk.count; token < round_up(chunk.count, 16); ++token) to[token] = 0;
}

// The elements of each token of a chunk in one head, and its format.
template <class Math>
void token_rows(Work<Math>& work, const Chunk& chunk, int side, int64_t head, const uint8_t** rows, uint8_t* formats) {
    for (int64_t number = 0; number < chunk.num_pieces; ++number) {
        const Piece& piece = chunk.pieces[number];
        const Side& part = piece.sides[side];
        const uint8_t* row = part.elements + head * part.head_bytes;
        for (int64_t i = 0; i < piece.count; ++i) rows[piece.begin + i] = row + i * part.token_bytes;
        memset(formats + piece.begin, static_cast<int>(part.format), piece.count);
    }
    for (int64_t token = chunk.count; token < round_up(chunk.count, 16); ++token) {
        rows[token] = work.nothing;
        formats[token] = formats[chunk.count - 1];
    }
}

// What the means of pages add to the scores of their tokens.
template <class Math>
void add_means(Work<Math>& work, const Chunk& chunk, int64_t head, int64_t first_row) {
    const int64_t dim = work.key_dim;
    for (int64_t number = 0; number < chunk.num_pieces; ++number) {
        const Piece& piece = chunk.pieces[number];
        const Side& keys = piece.sides[0];
        if (keys.means == nullptr) continue;
        read_scales(keys.means + head * dim * scale_bytes(keys.means_type), keys.means_type, dim, work.one_row);
        for (int64_t row = 0; row < work.rows; ++row) {
            const float* query = work.exact_queries + (first_row + row) * dim;
            Floats products = {};
            int64_t i = 0;
            for (; i + 16 <= dim; i += 16) products += load<Floats>(query + i) * load<Floats>(work.one_row + i);
            float added = sum(products);
            for (; i < dim; ++i) added += query[i] * work.one_row[i];
            float* scores = work.scores + row * kScores + piece.begin;
            for (int64_t token = 0; token < piece.count; ++token) scores[token] += added;
        }
    }
}

// Scores of one row to weights, times the scales of values; returns the largest.
template <class Math>
float soften(Work<Math>& work, const Chunk& chunk, int64_t row, int64_t place) {
    const AttendCall& call = work.call;
    const int64_t end = round_up(chunk.count, 16), query = work.item.query_begin + row / work.group;
    float* scores = work.scores + row * kScores;
    const float *scales = work.of_head + kChunk, *zeros = work.of_head + 3 * kChunk;
    if (call.softcap > 0) {
        const float cap = static_cast<float>(call.softcap) * kLog2E;
        for (int64_t i = 0; i < end; i += 16) store(scores + i, cap * tanh_of(load<Floats>(scores + i)));
    }
    const int64_t from = less(more(call.first[query] - chunk.begin, 0), end);
    const int64_t to = more(from, less(call.stop[query] - chunk.begin, chunk.count));
    for (int64_t i = 0; i < from; ++i) scores[i] = kMinusInfinity;
    for (int64_t i = to; i < end; ++i) scores[i] = kMinusInfinity;
    Floats highest = load<Floats>(scores);
    for (int64_t i = 16; i < end; i += 16) highest = larger(load<Floats>(scores + i), highest);
    const float before = work.most[place];
    float most = largest(highest);
    most = most > before ? most : before;
    if (most == kMinusInfinity) {
        for (int64_t i = 0; i < end; i += 16) store(scores + i, all(0.0f));
        work.corrections[row] = 1.0f;
        return 0.0f;
    }
    const bool has_zeros = call.layout->values.zeros >= 0;
    Floats total = {}, top = {}, shift = {};
    for (int64_t i = 0; i < end; i += 16) {
        const Floats weights = exp2_of(load<Floats>(scores + i) - most);
        Floats scaled = weights * load<Floats>(scales + i);
        if constexpr (Math::kRoundsWeights) {
            // What is summed up are the weights that will be taken, so that a row's weights still add up to 1.
            scaled = Math::rounded(scaled);
            const Floats inverse = load<Floats>(work.inverse + i);
            total += inverse != 0.0f ? scaled * inverse : weights;
        } else {
            total += weights;
        }
        top = larger(scaled, top);
        if (has_zeros) shift += weights * load<Floats>(zeros + i);
        store(scores + i, scaled);
    }
    const float correction = before == kMinusInfinity ? 0.0f : exp2_of(all(before - most))[0];
    work.most[place] = most;
    work.total[place] = work.total[place] * correction + sum(total);
    work.corrections[row] = correction;
    if (has_zeros) work.shift[place] = work.shift[place] * correction + sum(shift);
    return largest(top);
}

template <class Math>
void attend_head(Work<Math>& work, const Chunk& chunk, int64_t head) {
    const AttendCall& call = work.call;
    const int64_t first_row = head * work.rows, kv_head = work.item.head_begin + head;
    const bool has_zeros = call.layout->keys.zeros >= 0 || call.layout->values.zeros >= 0;
    const uint8_t* rows[kChunk];
    uint8_t formats[kChunk];
    for (int part = 0; part < (has_zeros ? 4 : 2); ++part) {
        pick_head(work, chunk, kv_head, part, part == 0 ? work.factor : 1.0f);
    }
    const float* key_scales = work.of_head;
    for (int64_t i = 0; Math::kRoundsWeights && i < round_up(chunk.count, 16); i += 16) {
        const Floats scales = load<Floats>(work.of_head + kChunk + i);
        store(work.inverse + i, scales < 1e-30f ? all(0.0f) : 1.0f / scales);
    }

    token_rows(work, chunk, 0, kv_head, rows, formats);
    Math::score(work, rows, formats, chunk.count, first_row, key_scales);
    if (call.layout->keys.zeros >= 0) {
        const float* zeros = work.of_head + 2 * kChunk;
        for (int64_t row = 0; row < work.rows; ++row) {
            float* scores = work.scores + row * kScores;
            for (int64_t i = 0; i < chunk.count; ++i) scores[i] += zeros[i] * work.query_sums[first_row + row];
        }
    }
    if (call.layout->keys.means >= 0) add_means(work, chunk, kv_head, first_row);
    for (int64_t row = 0; row < work.rows; ++row) {
        const float top = soften(work, chunk, row, first_row + row);
        Math::take_weights(work.scores + row * kScores, top, round_up(chunk.count, 16),
                           work.weights + row * Math::kWeightBytes, work.weight_scales + row);
    }

    token_rows(work, chunk, 1, kv_head, rows, formats);
    Math::weigh(work, rows, formats, chunk.count, first_row);
}

// A row's sums in their natural order, turned back, to the output.
inline void write_row(const AttendCall& call, int64_t query, int64_t head, float most, float total, float* sums) {
    const int64_t dim = call.layout->values.dim;
    if (call.sinks != nullptr) {
        const float sink = call.sinks[head] * kLog2E, top = sink > most ? sink : most;
        const float correction = most == kMinusInfinity ? 0.0f : exp2_of(all(most - top))[0];
        total = total * correction + exp2_of(all(sink - top))[0];
        for (int64_t i = 0; i < dim; ++i) sums[i] *= correction;
    }
    if (call.layout->turned) turn(sums, dim);
    const float factor = total == 0 ? 0.0f : 1.0f / total;
    const int64_t start = (query * call.n_q_heads + head) * dim;
    for (int64_t i = 0; i < dim; ++i) sums[i] *= factor;
    if (call.query_type == kFloat32) {
        memcpy(static_cast<float*>(call.out) + start, sums, dim * sizeof(float));
        return;
    }
    uint16_t* out = static_cast<uint16_t*>(call.out) + start;
    for (int64_t i = 0; i < dim; ++i) out[i] = to_bfloat16(sums[i]);
}

template <class Math>
void finish(Work<Math>& work) {
    for (int64_t head = 0; head < work.heads; ++head) {
        for (int64_t row = 0; row < work.rows; ++row) {
            const int64_t place = head * work.rows + row;
            float* partial = work.item.partial == nullptr
                                 ? nullptr : work.item.partial + place * partial_row(work.call);
            float* sums = partial == nullptr ? work.one_row : partial + 2;
            Math::in_order(work.sums + place * work.width, work.value_dim, sums);
            if (work.call.layout->values.zeros >= 0) {
                for (int64_t i = 0; i < work.value_dim; ++i) sums[i] += work.shift[place];
            }
            if (partial != nullptr) {
                partial[0] = work.most[place];
                partial[1] = work.total[place];
                continue;
            }
            write_row(work.call, work.item.query_begin + row / work.group,
                      (work.item.head_begin + head) * work.group + row % work.group,
                      work.most[place], work.total[place], sums);
        }
    }
}

template <class Math>
void run_item(const AttendCall& call, const Item& item, uint8_t* scratch) {
    Work<Math> work(call, item, scratch);
    memset(work.nothing, 0, more(work.key_dim, work.value_dim) * 4 + 64);
    Math::prepare(call, work.constants);
    prepare_queries(work);
    Chunk *chunk = work.chunks, *next = work.chunks + 1;
    const int64_t begin = item.token_begin, end = item.token_end;
    const bool all_heads = work.heads == call.layout->n_kv_heads;
    if (begin < end) find_tokens(call, item.sequence, begin, less(begin + kChunk, end), *chunk);
    for (int64_t token = begin; token < end; token += kChunk) {
        const int64_t after = token + kChunk;
        const bool more_follow = after < end;
        if (more_follow) find_tokens(call, item.sequence, after, less(after + kChunk, end), *next);
        read_chunk_scales(work, *chunk);
        if (more_follow && all_heads) {
            work.ahead.follow(*next, work.heads * 2 * (kChunk / 4));
        } else {
            work.ahead.rest();
        }
        for (int64_t head = 0; head < work.heads; ++head) {
            attend_head(work, *chunk, head);
            work.ahead.until(head + 1, work.heads);
        }
        Chunk* done = chunk;
        chunk = next;
        next = done;
    }
    finish(work);
}

template <class Math>
int64_t scratch_bytes_of(const AttendCall& call, const Item& item) {
    return Work<Math>(call, item, nullptr).bytes;
}

// The partial results of items that share their queries, which cover all heads, to the output.
inline void merge_partials(const AttendCall& call, const Item& item, const float* partials, int64_t count,
                           int64_t stride) {
    const int64_t rows = rows_of(call, item), group = group_of(call), dim = call.layout->values.dim;
    float sums[4096];
    for (int64_t place = 0; place < (item.head_end - item.head_begin) * rows; ++place) {
        const float* first = partials + place * partial_row(call);
        float most = kMinusInfinity, total = 0;
        for (int64_t i = 0; i < count; ++i) most = first[i * stride] > most ? first[i * stride] : most;
        memset(sums, 0, dim * sizeof(float));
        for (int64_t i = 0; i < count; ++i) {
            const float* partial = first + i * stride;
            const float factor = partial[0] == kMinusInfinity ? 0.0f : exp2_of(all(partial[0] - most))[0];
            if (partial[0] == kMinusInfinity) continue;
            total += partial[1] * factor;
            for (int64_t j = 0; j < dim; ++j) sums[j] += partial[2 + j] * factor;
        }
        write_row(call, item.query_begin + place % rows / group,
                  (item.head_begin + place / rows) * group + place % rows % group, most, total, sums);
    }
}

}  // namespace
}  // namespace kvcfg
