// Encodes whole pages of few bits from pages that were filled token by token.

#pragma once

#include <cstdint>

#include "append.h"
#include "page_layout.h"

namespace kvcfg {

// The levels of a format of few bits. A number goes to the cell (number - low) * cells_per_unit, and every cell of
// 8192 to one level: `edges` are the first cells of all levels but the first. `guess` is by 32 cells the level of the
// first of them. Whole numbers as a format are `uniform`: no cells, but rounding between the first and last level.
struct Levels {
    float count, low, cells_per_unit, uniform;
    float levels[64];  // ascending
    float codes[64];   // of the levels, in that order
    float edges[64];   // infinite behind the last one
    float guess[256];
};

struct CloseSide {
    int64_t dim;
    int64_t format;          // kInt8, kE4M3 or kE5M2; anything else: `bits` of `levels`
    int64_t bits, asymmetric;
    int64_t scale_type;
    int64_t centred, turned;
    int64_t elements, scales;  // bytes from the beginning of the page
    double largest;            // the largest element
    const Levels* levels;
    const double* narrower;    // [num_narrower] ranges that are tried, as parts of the full one
    int64_t num_narrower;
    const float* matrices;     // [n_kv_heads, dim, dim] instead of Hadamard's; null = none
};

// Pages that tokens are read from, stored one by one.
struct OpenPages {
    const uint8_t* pages;
    int64_t page_bytes;
    const PageLayout* layout;
};

struct CloseCall {
    int64_t page_size, n_kv_heads, sink_tokens;
    CloseSide keys, values;
    int64_t num_pages;
    const int64_t* page_ids;  // [num_pages]
    uint8_t* pages;
    int64_t page_bytes;
    const int64_t* places;    // [num_pages * page_size] slots of the tokens in `open`, or -1 - slot in `fresh`
    OpenPages open, fresh;
    int64_t threads;
};

// One side of one page.
using CloseOne = void (*)(const CloseCall& call, int64_t page, bool values);
CloseOne plain_closer();
CloseOne avx512_closer();

}  // namespace kvcfg

// 0 = done; 1 = no code for this format.
extern "C" int kvcfg_close(const kvcfg::CloseCall* call);
