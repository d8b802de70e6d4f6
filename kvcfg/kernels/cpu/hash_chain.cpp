// Names of a sequence's pages in one call: name[i] = H(name[i-1], ids of page i).
//
// H is SHA-256 or XXH3-128 (seed 0, digest in canonical order). The names are those that Python's hashlib and
// xxhash give; the first parent is the caller's.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ids are hashed as little-endian int32"
#endif

namespace {

// SHA-256

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};
constexpr uint32_t kInitial[8] = {
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
};
constexpr size_t kBlock = 64, kName = 32;

inline uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

void compress_plain(uint32_t state[8], const uint8_t* data, size_t blocks) {
    for (; blocks; --blocks, data += kBlock) {
        uint32_t w[64], s[8];
        std::memcpy(w, data, kBlock);
        for (int i = 0; i < 16; ++i) w[i] = __builtin_bswap32(w[i]);
        for (int i = 16; i < 64; ++i) {
            const uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + w[i - 7] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        std::memcpy(s, state, sizeof s);
#pragma GCC unroll 64
        for (int i = 0; i < 64; ++i) {  // the eight words stay where they are; their roles move on
            const uint32_t a = s[(0 - i) & 7], b = s[(1 - i) & 7], c = s[(2 - i) & 7];
            const uint32_t e = s[(4 - i) & 7], f = s[(5 - i) & 7], g = s[(6 - i) & 7];
            uint32_t &d = s[(3 - i) & 7], &h = s[(7 - i) & 7];
            h += (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + kRounds[i] + w[i];
            d += h;
            h += (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        }
        for (int i = 0; i < 8; ++i) state[i] += s[i];
    }
}

#if defined(__x86_64__)

// The CPU's own rounds: `abef` and `cdgh` hold the eight words in the order that its instructions want.
__attribute__((target("sha,sse4.1,ssse3"))) void compress_sha_ni(uint32_t state[8], const uint8_t* data, size_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i dcba = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state));
    __m128i hgfe = _mm_loadu_si128(reinterpret_cast<const __m128i*>(state + 4));
    const __m128i cdab = _mm_shuffle_epi32(dcba, 0xb1), efgh = _mm_shuffle_epi32(hgfe, 0x1b);
    __m128i abef = _mm_alignr_epi8(cdab, efgh, 8), cdgh = _mm_blend_epi16(efgh, cdab, 0xf0);
    for (; blocks; --blocks, data += kBlock) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i)
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data + 16 * i)), swap);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
            if (i >= 4) {
                __m128i& oldest = w[i % 4];
                const __m128i last = w[(i + 3) % 4], before = w[(i + 2) % 4];
                oldest = _mm_sha256msg1_epu32(oldest, w[(i + 1) % 4]);
                oldest = _mm_add_epi32(oldest, _mm_alignr_epi8(last, before, 4));
                oldest = _mm_sha256msg2_epu32(oldest, last);
            }
            const __m128i key = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRounds + 4 * i));
            const __m128i input = _mm_add_epi32(w[i % 4], key);
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, input);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(input, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    dcba = _mm_blend_epi16(feba, dchg, 0xf0);
    hgfe = _mm_alignr_epi8(dchg, feba, 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state), dcba);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), hgfe);
}

bool has_sha_ni() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1 && __builtin_cpu_supports("sse4.1");
}

const bool kShaNi = has_sha_ni();

#else

constexpr bool kShaNi = false;
constexpr auto compress_sha_ni = compress_plain;

#endif

using Compress = void (*)(uint32_t state[8], const uint8_t* data, size_t blocks);

// One message: a 32-byte name, then a page.
void sha256_name(Compress compress, const uint8_t* parent, const uint8_t* page, size_t page_bytes, uint8_t* name) {
    uint32_t state[8];
    std::memcpy(state, kInitial, sizeof state);
    uint8_t edge[2 * kBlock];
    const size_t head = page_bytes < kBlock - kName ? page_bytes : kBlock - kName;
    std::memcpy(edge, parent, kName);
    std::memcpy(edge + kName, page, head);
    size_t filled = kName + head;
    if (filled == kBlock) {
        compress(state, edge, 1);
        const size_t rest = page_bytes - head, whole = rest / kBlock;
        compress(state, page + head, whole);
        filled = rest % kBlock;
        std::memcpy(edge, page + page_bytes - filled, filled);
    }
    const size_t blocks = filled + 9 <= kBlock ? 1 : 2;
    std::memset(edge + filled, 0, blocks * kBlock - filled);
    edge[filled] = 0x80;
    const uint64_t bits = __builtin_bswap64(8 * static_cast<uint64_t>(kName + page_bytes));
    std::memcpy(edge + blocks * kBlock - 8, &bits, 8);
    compress(state, edge, blocks);
    for (int i = 0; i < 8; ++i) state[i] = __builtin_bswap32(state[i]);
    std::memcpy(name, state, kName);
}

// XXH3-128

constexpr uint64_t kP32[3] = {0x9e3779b1, 0x85ebca77, 0xc2b2ae3d};
constexpr uint64_t kP64[5] = {
    0x9e3779b185ebca87, 0xc2b2ae3d27d4eb4f, 0x165667b19e3779f9, 0x85ebca77c2b2ae63, 0x27d4eb2f165667c5,
};
constexpr size_t kSecretBytes = 192, kStripe = 64, kStripesPerBlock = 16;
constexpr uint8_t kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

struct Pair {
    uint64_t low, high;
};

inline uint64_t read64(const uint8_t* data) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    return word;
}

inline uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t x) {
    x = (x ^ x >> 37) * 0x165667919e3779f9;
    return x ^ x >> 32;
}

inline uint64_t mix16(const uint8_t* data, const uint8_t* secret) {
    return fold(read64(data) ^ read64(secret), read64(data + 8) ^ read64(secret + 8));
}

inline void mix32(Pair& sum, const uint8_t* a, const uint8_t* b, const uint8_t* secret) {
    sum.low = (sum.low + mix16(a, secret)) ^ (read64(b) + read64(b + 8));
    sum.high = (sum.high + mix16(b, secret + 16)) ^ (read64(a) + read64(a + 8));
}

inline Pair finish(Pair sum, uint64_t size) {
    const uint64_t low = sum.low + sum.high, high = sum.low * kP64[0] + sum.high * kP64[3] + size * kP64[1];
    return {avalanche(low), 0 - avalanche(high)};
}

// 17 to 128 bytes: pairs from both ends, inwards.
Pair hash_short(const uint8_t* data, size_t size) {
    Pair sum{size * kP64[0], 0};
    for (int i = static_cast<int>((size - 1) / 32); i >= 0; --i)
        mix32(sum, data + 16 * i, data + size - 16 * (i + 1), kSecret + 32 * i);
    return finish(sum, size);
}

// 129 to 240 bytes: 32 at a time, the last 32 once more.
Pair hash_middle(const uint8_t* data, size_t size) {
    Pair sum{size * kP64[0], 0};
    for (size_t end = 32; end < 160; end += 32) mix32(sum, data + end - 32, data + end - 16, kSecret + end - 32);
    sum = {avalanche(sum.low), avalanche(sum.high)};
    for (size_t end = 160; end <= size; end += 32) mix32(sum, data + end - 32, data + end - 16, kSecret + end - 157);
    mix32(sum, data + size - 16, data + size - 32, kSecret + 103);
    return finish(sum, size);
}

inline void accumulate(uint64_t sums[8], const uint8_t* data, const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t word = read64(data + 8 * i), key = word ^ read64(secret + 8 * i);
        sums[i ^ 1] += word;
        sums[i] += (key & 0xffffffff) * (key >> 32);
    }
}

inline uint64_t merge(const uint64_t sums[8], const uint8_t* secret, uint64_t start) {
    for (int i = 0; i < 4; ++i)
        start += fold(sums[2 * i] ^ read64(secret + 16 * i), sums[2 * i + 1] ^ read64(secret + 16 * i + 8));
    return avalanche(start);
}

// More than 240 bytes: stripes of 64 in blocks of 16, the last 64 bytes once more.
Pair hash_long(const uint8_t* data, size_t size) {
    uint64_t sums[8] = {kP32[2], kP64[0], kP64[1], kP64[2], kP64[3], kP32[1], kP64[4], kP32[0]};
    const size_t stripes = (size - 1) / kStripe;
    for (size_t stripe = 0; stripe < stripes; ++stripe) {
        const size_t place = stripe % kStripesPerBlock;
        accumulate(sums, data + kStripe * stripe, kSecret + 8 * place);
        if (place + 1 == kStripesPerBlock)
            for (int i = 0; i < 8; ++i)
                sums[i] = (sums[i] ^ sums[i] >> 47 ^ read64(kSecret + kSecretBytes - kStripe + 8 * i)) * kP32[0];
    }
    accumulate(sums, data + size - kStripe, kSecret + kSecretBytes - kStripe - 7);
    return {merge(sums, kSecret + 11, size * kP64[0]), merge(sums, kSecret + kSecretBytes - kStripe - 11, ~(size * kP64[1]))};
}

void xxh3_128(const uint8_t* data, size_t size, uint8_t* name) {
    const Pair hash = size <= 128 ? hash_short(data, size) : size <= 240 ? hash_middle(data, size) : hash_long(data, size);
    const uint64_t words[2] = {__builtin_bswap64(hash.high), __builtin_bswap64(hash.low)};
    std::memcpy(name, words, sizeof words);
}

}  // namespace

extern "C" {

// int64 to int32; 0 if a number does not fit.
int kvcfg_narrow(const int64_t* wide, size_t count, int32_t* narrow) {
    uint64_t lost = 0;
    for (size_t i = 0; i < count; ++i) {
        narrow[i] = static_cast<int32_t>(wide[i]);
        lost |= static_cast<uint64_t>(wide[i]) ^ static_cast<uint64_t>(static_cast<int64_t>(narrow[i]));
    }
    return lost == 0;
}

// names: pages * 32 bytes; plain: whether to do without the CPU's own rounds.
void kvcfg_sha256_chain(const uint8_t* parent, const uint8_t* ids, size_t page_bytes, size_t pages, uint8_t* names,
                        int plain) {
    const Compress compress = kShaNi && !plain ? compress_sha_ni : compress_plain;
    for (size_t page = 0; page < pages; ++page, ids += page_bytes, names += kName) {
        sha256_name(compress, parent, ids, page_bytes, names);
        parent = names;
    }
}

// names: pages * 16 bytes.
void kvcfg_xxh3_128_chain(const uint8_t* parent, const uint8_t* ids, size_t page_bytes, size_t pages, uint8_t* names,
                          int) {
    std::vector<uint8_t> message(16 + page_bytes);
    for (size_t page = 0; page < pages; ++page, ids += page_bytes, names += 16) {
        std::memcpy(message.data(), parent, 16);
        std::memcpy(message.data() + 16, ids, page_bytes);
        xxh3_128(message.data(), message.size(), names);
        parent = names;
    }
}
}
