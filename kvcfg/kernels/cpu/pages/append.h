// Stores tokens one by one: what a call is given, and the loops that do it.

#pragma once

#include <cstdint>

#include "page_layout.h"

namespace kvcfg {

// Keys or values of some tokens, as they come.
struct Incoming {
    const uint8_t* numbers;       // [num_tokens, n_kv_heads, dim]
    int64_t stride, head_stride;  // in numbers
};

struct AppendCall {
    int64_t number_type;       // kFloat32, kFloat16 or kBFloat16: of keys and of values
    Incoming keys, values;
    int64_t num_slots;
    const int64_t* slots;      // where tokens are stored; a slot below 0 stores nothing
    const int64_t* rows;       // which tokens; null = the first num_slots
    uint8_t* pages;            // one layer's arena [num_pages, page_bytes]
    int64_t page_bytes, num_pages;
    const PageLayout* layout;
    const float* head_scales;  // [2, n_kv_heads] scales of keys and of values where none are stored; null = 1
    int64_t* clipped;          // [2] what lay beyond the range of such scales is added to it; may be null
    int64_t threads;
};

enum AppendResult { kStored = 0, kNoCode = 1, kNoSuchSlot = 2 };

constexpr int64_t kMostNumbers = 1024;  // of a head: what loops have room for

// How tokens are encoded, for one side.
struct TokenSide {
    const SideLayout* layout;
    int64_t n_heads, number_type, head_bytes;  // head_bytes: from one head's numbers to the next one's
    bool turned;
    const float* head_scales;                  // [n_heads]; null = 1
};

// Where one token comes from, and where it goes.
struct TokenPlace {
    const uint8_t* numbers;
    uint8_t *elements, *scales;
};

// Encodes tokens; returns how many numbers lay beyond the range of scales that do not follow them.
using EncodeTokens = int64_t (*)(const TokenSide& side, const TokenPlace* places, int64_t count);

// The loop for a side; null where there is no code for its format.
EncodeTokens plain_encoder(const TokenSide& side);
EncodeTokens avx512_encoder(const TokenSide& side);

}  // namespace kvcfg

// An AppendResult; nothing is stored unless it is kStored.
extern "C" int kvcfg_append(const kvcfg::AppendCall* call);
