// Paged attention: what a call is given, and what a piece of its work is.

#pragma once

#include <cstdint>

#include "page_layout.h"

namespace kvcfg {

struct AttendCall {
    int64_t num_sequences, num_queries, n_q_heads, query_type;  // query_type: kFloat32 or kBFloat16; out has the same
    const void* queries;           // [num_queries, n_q_heads, keys.dim]
    int64_t query_stride, query_head_stride;  // in numbers
    void* out;                     // [num_queries, n_q_heads, values.dim], contiguous
    const int32_t* query_starts;   // [num_sequences + 1] first query of each sequence
    const int32_t* first;          // [num_queries] a query sees tokens first .. stop - 1 of its sequence
    const int32_t* stop;
    const uint8_t* pages;          // one layer's arena [num_pages + 1, page_bytes]
    int64_t page_bytes;
    const PageLayout* layout;
    const int32_t* tables;         // page n of sequence s: tables[s * table_stride + n % table_columns]
    int64_t table_stride, table_columns;
    const float* levels;           // [2, 16] the numbers of 4-bit codes of keys and of values; may be null
    const float* head_scales;      // [2, n_kv_heads] scales where none are stored; null = 1
    const uint8_t* open_pages;     // pages that are being filled; null = none
    int64_t open_page_bytes;
    const PageLayout* open_layout;
    const int32_t* open_rows;      // [num_sequences] first page of each sequence's ring in open_pages
    const int32_t* closed;         // [num_sequences] tokens read from closed pages; later token t is in ring slot
    int64_t ring_tokens;           // t % ring_tokens
    const float* sinks;            // [n_q_heads] logits that take part in the sum alone; may be null
    double scale, softcap;         // score = scale * q.k, or softcap * tanh(scale * q.k / softcap) if softcap > 0
    int64_t threads;
};

// Some queries of one sequence over some of its tokens, for some KV heads.
struct Item {
    int64_t sequence, query_begin, query_end, head_begin, head_end, token_begin, token_end;
    float* partial;  // where tokens are split over items: [head][row][m, l, sums of values]; null = write the output
};

// A row is one query in one query head; those of a KV head stand together, query after query.
inline int64_t group_of(const AttendCall& call) { return call.n_q_heads / call.layout->n_kv_heads; }

inline int64_t rows_of(const AttendCall& call, const Item& item) {
    return (item.query_end - item.query_begin) * group_of(call);
}

// Numbers of a row's partial result: its maximum, its sum, and the weighted values.
inline int64_t partial_row(const AttendCall& call) { return 2 + call.layout->values.dim; }

constexpr int64_t kMaxRows = 64;  // rows of a KV head that one item takes

// One instruction set's code.
struct Kernels {
    int64_t (*scratch_bytes)(const AttendCall&, const Item&);
    void (*run)(const AttendCall&, const Item&, uint8_t* scratch);
    void (*merge)(const AttendCall&, const Item&, const float* partials, int64_t count, int64_t stride);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

}  // namespace kvcfg
