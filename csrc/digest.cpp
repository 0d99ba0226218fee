#include "digest.h"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace roll {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: what byte b contributes when k more bytes follow it.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? kPolynomial : 0);
        tables[0][byte] = crc;
    }
    for (size_t k = 1; k < 8; ++k) {
        for (size_t byte = 0; byte < 256; ++byte) {
            uint32_t before = tables[k - 1][byte];
            tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
        }
    }
    return tables;
}

constexpr Tables kTables = make_tables();

// `state`, here and below, is the inverted CRC between two bytes.
uint32_t advance_portable(uint32_t state, const uint8_t* p, size_t n) {
    if constexpr (std::endian::native == std::endian::little) {
        for (; n >= 8; n -= 8, p += 8) {
            uint32_t low, high;
            std::memcpy(&low, p, 4);
            std::memcpy(&high, p + 4, 4);
            low ^= state;
            state = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^ kTables[5][(low >> 16) & 0xFF] ^
                    kTables[4][low >> 24] ^ kTables[3][high & 0xFF] ^ kTables[2][(high >> 8) & 0xFF] ^
                    kTables[1][(high >> 16) & 0xFF] ^ kTables[0][high >> 24];
        }
    }
    for (; n > 0; --n, ++p) state = (state >> 8) ^ kTables[0][(state ^ *p) & 0xFF];
    return state;
}

#if defined(__x86_64__)

// Carry-less multiplication by x^(512 +- 32) and x^(128 +- 32) modulo the polynomial, reflected: it moves 16
// bytes of message 64 (or 16) bytes further on without changing the remainder.
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i value, __m128i factors, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(value, factors, 0x00);
    __m128i high = _mm_clmulepi64_si128(value, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

__attribute__((target("pclmul,sse4.1"))) uint32_t advance_pclmul(uint32_t state, const uint8_t* p, size_t n) {
    if (n < 64) return advance_portable(state, p, n);
    const __m128i by_64 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_16 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    auto load = [](const uint8_t* q) __attribute__((target("pclmul,sse4.1"))) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    };
    __m128i a = _mm_xor_si128(load(p), _mm_cvtsi32_si128(static_cast<int>(state)));
    __m128i b = load(p + 16), c = load(p + 32), d = load(p + 48);
    for (p += 64, n -= 64; n >= 64; p += 64, n -= 64) {
        a = fold(a, by_64, load(p));
        b = fold(b, by_64, load(p + 16));
        c = fold(c, by_64, load(p + 32));
        d = fold(d, by_64, load(p + 48));
    }
    a = fold(fold(fold(a, by_16, b), by_16, c), by_16, d);
    for (; n >= 16; p += 16, n -= 16) a = fold(a, by_16, load(p));
    // The 16 folded bytes have the remainder of everything before: the table form takes them.
    uint8_t rest[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), a);
    return advance_portable(advance_portable(0, rest, 16), p, n);
}

#elif defined(__ARM_FEATURE_CRC32)

uint32_t advance_armv8(uint32_t state, const uint8_t* p, size_t n) {
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        std::memcpy(&word, p, 8);
        state = __crc32d(state, word);
    }
    for (; n > 0; --n, ++p) state = __crc32b(state, *p);
    return state;
}

#endif

using Advance = uint32_t (*)(uint32_t, const uint8_t*, size_t);

// The fastest form that this processor has.
Advance fastest() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) return advance_pclmul;
#elif defined(__ARM_FEATURE_CRC32)
    return advance_armv8;
#endif
    return advance_portable;
}

// The product of two polynomials modulo the CRC's; the highest bit is the coefficient of x^0.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (; a != 0; a <<= 1) {
        if (a & 0x80000000u) product ^= b;
        b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
    }
    return product;
}

// powers[k] = x^(8 * 2^k): what 2^k bytes that follow do to a CRC.
constexpr std::array<uint32_t, 64> make_powers() {
    std::array<uint32_t, 64> powers{};
    powers[0] = 0x00800000u;
    for (size_t k = 1; k < 64; ++k) powers[k] = multiply(powers[k - 1], powers[k - 1]);
    return powers;
}

constexpr std::array<uint32_t, 64> kPowers = make_powers();

}  // namespace

uint32_t crc32(const void* data, size_t nbytes, uint32_t start) {
    static const Advance advance = fastest();
    return ~advance(~start, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t crc32_portable(const void* data, size_t nbytes, uint32_t start) {
    return ~advance_portable(~start, static_cast<const uint8_t*>(data), nbytes);
}

uint32_t crc32_combine(uint32_t a, uint32_t b, uint64_t nbytes_b) {
    for (int k = 0; nbytes_b != 0 && a != 0; ++k, nbytes_b >>= 1) {
        if (nbytes_b & 1) a = multiply(kPowers[k], a);
    }
    return a ^ b;
}

}  // namespace roll
