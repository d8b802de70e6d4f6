// Codes of 6 to 2 bits in whole bytes: see kvcfg/formats/packing.py for where each bit goes.

#pragma once

#include <cstdint>
#include <cstring>

namespace kvcfg {
namespace {

// Two numbers of 4 bits, or four of 2 bits, to a byte, the first one lowest. Whole words let compilers vectorise.
inline void join_pairs(const uint8_t* codes, int64_t num_bytes, uint8_t* to) {
    for (int64_t i = 0; i < num_bytes; ++i) {
        uint16_t word;
        memcpy(&word, codes + 2 * i, 2);
        to[i] = uint8_t((word & 0xF) | (word >> 4 & 0xF0));
    }
}

inline void join_fours(const uint8_t* codes, int64_t num_bytes, uint8_t* to) {
    for (int64_t i = 0; i < num_bytes; ++i) {
        uint32_t word;
        memcpy(&word, codes + 4 * i, 4);
        to[i] = uint8_t((word & 3) | (word >> 6 & 0xC) | (word >> 12 & 0x30) | (word >> 18 & 0xC0));
    }
}

// The bits above the low ones of group `index`, together.
inline uint8_t high_bits(const uint8_t* codes, int64_t index, int bits) {
    const uint8_t* group = codes + index * (bits == 3 ? 4 : 2);
    if (bits == 3) return uint8_t(group[0] >> 2 | group[1] >> 2 << 1 | group[2] >> 2 << 2 | group[3] >> 2 << 3);
    if (bits == 5) return uint8_t(group[0] >> 4 | group[1] >> 4 << 1);
    return uint8_t(group[0] >> 4 | group[1] >> 4 << 2);
}

inline void pack(const uint8_t* codes, int64_t count, int bits, uint8_t* to) {
    const int64_t groups = bits < 4 ? count / 4 : count / 2;
    if (bits < 4) {
        join_fours(codes, groups, to);
    } else {
        join_pairs(codes, groups, to);
    }
    if (bits == 4 || bits == 2) return;
    const int per_byte = bits == 5 ? 4 : 2, width = 8 / per_byte;
    const int64_t num_bytes = groups / per_byte;
    for (int64_t i = 0; i < num_bytes; ++i) {
        int byte = 0;
        for (int part = 0; part < per_byte; ++part) byte |= high_bits(codes, part * num_bytes + i, bits) << part * width;
        to[groups + i] = uint8_t(byte);
    }
}

}  // namespace
}  // namespace kvcfg
