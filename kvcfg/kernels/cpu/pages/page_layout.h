// Where the numbers of one layer's page lie. Everything is an int64, so that Python hands it over as a list of ints.
//
//   key elements | value elements | key scales | value scales        of tokens that are stored one by one
//   and where a page is stored as a whole, after the scales of each side: means | sinks | scales of sinks
//
// A token's elements of all heads follow one another, and so do its scales.

#pragma once

#include <cstdint>

namespace kvcfg {

enum ElementFormat : int64_t { kFloat32, kFloat16, kBFloat16, kE4M3, kE5M2, kInt8, kCodes4 };
enum ScaleType : int64_t { kNoScale, kScaleFloat32, kScaleFloat16, kScaleBFloat16 };

struct SideLayout {
    int64_t format;           // ElementFormat
    int64_t dim;              // numbers of a head
    int64_t elements;         // byte of the page where the first token's elements begin, sinks left out
    int64_t token_bytes;      // from one token's elements to the next one's
    int64_t head_bytes;       // from one head's elements to the next one's
    int64_t scales;           // byte where the first token's scales begin, one a head
    int64_t scale_type;       // ScaleType; kNoScale: every head has one scale for all tokens, which the call names
    int64_t means;            // byte of the page's means [n_kv_heads, dim] in the type of scales; -1 = none
    int64_t sinks;            // byte of the int8 elements of the page's first tokens, in rows of n_kv_heads * dim
    int64_t sink_scales;      // byte of their float16 scales
    int64_t zeros;            // byte where the first token's zeros begin, as its scales; -1 = none
};

struct PageLayout {
    int64_t page_size;        // tokens
    int64_t n_kv_heads;
    int64_t sink_tokens;      // first tokens of a page that are kept in int8
    int64_t turned;           // 1: keys and values are stored turned by a Hadamard matrix
    SideLayout keys, values;
};

}  // namespace kvcfg
