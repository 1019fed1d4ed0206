// Products of 8-bit whole numbers, see rounded.py: both sides are turned by blocks of 32, so that no number stands out. A weight is rounded
// row by row, what it is multiplied with in groups of 256 numbers of a row, each with a scale. The sums of a group are exact; they
// are added up in fp32, and turned back.
//
// Everything here is the work of one thread.
#pragma once
#include "common.h"

#ifdef LORAFIT_CODES
#include <algorithm>

// One part of a sum: codes a (rows, k), each group of a row with a scale and the sum of its codes; a weight's codes b (columns, k) if
// `across` (A·Bᵀ), else (k, columns), with stride ldb. k and columns are multiples of 64. `scale` of each column, over 127, or null. a has
// room for whole bands of 32 rows.
struct CodesPart {
    const int8_t* a;
    const float* a_scale;
    const int32_t* a_sum;
    const int8_t* b;
    int64_t ldb;
    int64_t k;
    int64_t across;
    const float* scale;
};

namespace {
namespace codes {

constexpr int64_t DEEP = 64, TILE = 1024;  // bytes in a tile: 16 lines of 16 columns, 4 codes deep
constexpr int64_t HIGH = 32;               // rows of a band
constexpr int64_t GROUP = 256;             // numbers of a row that share a scale; the last may be fewer
constexpr float MAGIC = 12582912.0f;       // 1.5 * 2^23: of a sum with it the last bits are the nearest whole number
constexpr float TURN = 0.17677669529663687f;  // 1/sqrt(32)

inline int64_t groups(int64_t k) { return (k + GROUP - 1) / GROUP; }

// 32 numbers in as many registers as they take.
constexpr int REGISTERS = 32 / EACH;

struct Line {
    Some part[REGISTERS];

    template <typename Make>
    static INLINE Line of(Make make) {
        Line line;
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; i++) line.part[i] = make(i);
        return line;
    }
    static INLINE Line from(const float* p) {
        return of([p](int i) { return *(const Some*)(p + i * EACH); });
    }
#ifdef WIDE_VECTORS
    static INLINE Line from(const bf16* p) {
        return of([p](int i) { return (Some)widen(p + i * EACH); });
    }
#endif
    INLINE void to(float* p) const {
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; i++) *(Some*)(p + i * EACH) = part[i];
    }
};
INLINE Line operator*(const Line& a, const Line& b) {
    return Line::of([&](int i) { return a.part[i] * b.part[i]; });
}
INLINE Line operator*(const Line& a, float b) {
    return Line::of([&](int i) { return a.part[i] * b; });
}
INLINE Line operator+(const Line& a, const Line& b) {
    return Line::of([&](int i) { return a.part[i] + b.part[i]; });
}

// Every number plus the one that lies a power of two away, or less it: in one register, for all powers.
INLINE void turn(Some& numbers) {
#ifdef WIDE_VECTORS
    __m512 x = (__m512)numbers;
    auto swap = [&x](__m512 other, __mmask16 minus) { x = _mm512_add_ps(other, _mm512_mask_sub_ps(x, minus, _mm512_setzero_ps(), x)); };
    swap(_mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
    swap(_mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
    swap(_mm512_permute_ps(x, 0x4e), 0xcccc);
    swap(_mm512_permute_ps(x, 0xb1), 0xaaaa);
#else
    const __m256 zero = _mm256_setzero_ps();
    __m256 x = (__m256)numbers;
    x = _mm256_add_ps(_mm256_permute2f128_ps(x, x, 1), _mm256_blend_ps(x, _mm256_sub_ps(zero, x), 0xf0));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0x4e), _mm256_blend_ps(x, _mm256_sub_ps(zero, x), 0xcc));
    x = _mm256_add_ps(_mm256_permute_ps(x, 0xb1), _mm256_blend_ps(x, _mm256_sub_ps(zero, x), 0xaa));
#endif
    numbers = (Some)x;
}

// The Hadamard transform of 32 numbers, times sqrt(32): its own inverse but for 32.
INLINE void turn(Line& line) {
#pragma GCC unroll 2
    for (int apart = REGISTERS / 2; apart > 0; apart /= 2)
#pragma GCC unroll 4
        for (int i = 0; i < REGISTERS; i++)
            if (!(i & apart)) {
                Some one = line.part[i], other = line.part[i + apart];
                line.part[i] = one + other, line.part[i + apart] = one - other;
            }
#pragma GCC unroll 4
    for (int i = 0; i < REGISTERS; i++) turn(line.part[i]);
}

// Columns c..c+16 of b, DEEP deep, as a tile. The processor multiplies numbers with a sign by numbers without: a weight's codes are
// stored with 128 more, and what that adds is taken off again by way of `a_sum`.
inline void pack(const CodesPart& part, int64_t k, int64_t column, uint8_t* tile) {
    const int64_t ldb = part.ldb;
    if (part.across) {
        transpose(part.b + column * ldb + k, ldb, tile, 64);
        for (int i = 0; i < TILE; i++) tile[i] ^= 128;
        return;
    }
    const int8_t* b = part.b + k * ldb + column;
    const __m128i more = _mm_set1_epi8(-128);
    for (int i = 0; i < 16; i++, b += 4 * ldb) {
        auto row = [&](int64_t r) { return _mm_xor_si128(_mm_loadu_si128((const __m128i*)(b + r * ldb)), more); };
        __m128i low = _mm_unpacklo_epi8(row(0), row(1)), low2 = _mm_unpacklo_epi8(row(2), row(3));
        __m128i high = _mm_unpackhi_epi8(row(0), row(1)), high2 = _mm_unpackhi_epi8(row(2), row(3));
        __m128i* line = (__m128i*)(tile + 64 * i);
        _mm_store_si128(line, _mm_unpacklo_epi16(low, low2)), _mm_store_si128(line + 1, _mm_unpackhi_epi16(low, low2));
        _mm_store_si128(line + 2, _mm_unpacklo_epi16(high, high2)), _mm_store_si128(line + 3, _mm_unpackhi_epi16(high, high2));
    }
}

// The 32 columns from `column` on, all their depth: two tiles for each DEEP, side by side.
inline void pack_panel(const CodesPart& part, int64_t column, uint8_t* to) {
    for (int64_t k = 0; k < part.k; k += DEEP, to += 2 * TILE) {
        pack(part, k, column, to);
        pack(part, k, column + 16, to + TILE);
    }
}

#ifdef LORAFIT_AMX
// The sums of 32 rows (of which `tall` are wanted) and 32 columns, `steps` deep.
INLINE void multiply(const int8_t* a, int64_t lda, const uint8_t* b, int64_t steps, int64_t, int32_t* sums) {
    tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
    for (; steps > 0; steps--, a += DEEP, b += 2 * TILE) {
        tiles::load<4>(a, lda), tiles::load<5>(a + 16 * lda, lda);
        tiles::load<6>(b, 64), tiles::load<7>(b + TILE, 64);
        tiles::multiply_codes<0, 1, 4>();
        tiles::multiply_codes<2, 3, 5>();
    }
    tiles::store<0>(sums, 128), tiles::store<1>(sums + 16, 128);
    tiles::store<2>(sums + 16 * 32, 128), tiles::store<3>(sums + 16 * 32 + 16, 128);
}
#elif defined(WIDE_VECTORS)
// Written out: of sums in an array, or given to the intrinsic, the compiler keeps copies in memory, which takes twice the time.
struct Pair {
    __m512i left = _mm512_setzero_si512(), right = _mm512_setzero_si512();

    INLINE void add(const int8_t* a, __m512i b, __m512i b2) {
        int four;
        std::memcpy(&four, a, 4);
        __m512i same = _mm512_set1_epi32(four);
        __asm__("vpdpbusd %2, %1, %0" : "+v"(left) : "v"(b), "v"(same));
        __asm__("vpdpbusd %2, %1, %0" : "+v"(right) : "v"(b2), "v"(same));
    }
    INLINE void store(int32_t* sums) const { _mm512_store_si512(sums, left), _mm512_store_si512(sums + 16, right); }
};

inline void multiply(const int8_t* a, int64_t lda, const uint8_t* b, int64_t steps, int64_t tall, int32_t* sums) {
    for (int64_t row = 0; row < tall; row += 8, a += 8 * lda, sums += 8 * 32) {
        Pair r0, r1, r2, r3, r4, r5, r6, r7;
        const int8_t* at = a;
        const uint8_t* tile = b;
        for (int64_t s = 0; s < steps; s++, tile += 2 * TILE)
            for (int line = 0; line < 16; line++, at += 4) {
                __m512i left = _mm512_load_si512(tile + 64 * line), right = _mm512_load_si512(tile + TILE + 64 * line);
                r0.add(at, left, right), r1.add(at + lda, left, right);
                r2.add(at + 2 * lda, left, right), r3.add(at + 3 * lda, left, right);
                r4.add(at + 4 * lda, left, right), r5.add(at + 5 * lda, left, right);
                r6.add(at + 6 * lda, left, right), r7.add(at + 7 * lda, left, right);
            }
        r0.store(sums), r1.store(sums + 32), r2.store(sums + 64), r3.store(sums + 96);
        r4.store(sums + 128), r5.store(sums + 160), r6.store(sums + 192), r7.store(sums + 224);
    }
}
#else
struct Four {  // rows of 16 columns
    __m256i low = _mm256_setzero_si256(), high = low;

    INLINE void add(const int8_t* a, __m256i b, __m256i b2) {
        int four;
        std::memcpy(&four, a, 4);
        __m256i same = _mm256_set1_epi32(four);
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(low) : "x"(b), "x"(same));
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(high) : "x"(b2), "x"(same));
    }
    INLINE void store(int32_t* sums) const { _mm256_store_si256((__m256i*)sums, low), _mm256_store_si256((__m256i*)sums + 1, high); }
};

inline void multiply(const int8_t* a, int64_t lda, const uint8_t* b, int64_t steps, int64_t tall, int32_t* sums) {
    for (int64_t row = 0; row < tall; row += 4, a += 4 * lda, sums += 4 * 32)
        for (int half = 0; half < 2; half++) {
            Four r0, r1, r2, r3;
            const int8_t* at = a;
            const uint8_t* tile = b + half * TILE;
            for (int64_t s = 0; s < steps; s++, tile += 2 * TILE)
                for (int line = 0; line < 16; line++, at += 4) {
                    const __m256i* columns = (const __m256i*)(tile + 64 * line);
                    __m256i low = _mm256_load_si256(columns), high = _mm256_load_si256(columns + 1);
                    r0.add(at, low, high), r1.add(at + lda, low, high);
                    r2.add(at + 2 * lda, low, high), r3.add(at + 3 * lda, low, high);
                }
            int32_t* to = sums + 16 * half;
            r0.store(to), r1.store(to + 32), r2.store(to + 64), r3.store(to + 96);
        }
}
#endif

// The rows m..m+tall of a part, times the 32 columns from `column` on that are packed in b: into `sums` (32, 32), or on top of them.
inline void add(const CodesPart& part, const uint8_t* b, int64_t m, int64_t tall, int64_t column, bool begin, float* sums) {
    alignas(64) int32_t whole[32 * 32];
    alignas(64) float mixed[32 * 32];
    const int64_t count = groups(part.k);
    const Line share = part.scale ? Line::from(part.scale + column) * (TURN / 127) : Line::of([](int) { return Some{} + TURN; });
    for (int64_t g = 0; g < count; g++) {
        int64_t begins = g * GROUP, steps = (std::min(part.k, begins + GROUP) - begins) / DEEP;
        multiply(part.a + m * part.k + begins, part.k, b + begins * 32, steps, tall, whole);
        for (int64_t i = 0; i < tall; i++) {
            const int32_t more = part.a_sum[(m + i) * count + g] * 128;
            float* line = mixed + i * 32;
            Line x = Line::of([&](int j) { return __builtin_convertvector(*(const SomeInts*)(whole + i * 32 + j * EACH) - more, Some); });
            x = x * part.a_scale[(m + i) * count + g];
            if (g) x = x + Line::from(line);
            if (g + 1 < count) {
                x.to(line);
                continue;
            }
            x = x * share;
            turn(x);
            float* to = sums + i * 32;
            (begin ? x : x + Line::from(to)).to(to);
        }
    }
}

// Thread t's share of the rows of x (rows, k), turned, each number then times that of `share` over 127 for its column if there is one:
// codes, and of each group scale and sum. What isn't finite makes the scales of its row so. `row` has room for k numbers.
template <typename X>
inline void round(const X* x, int64_t ldx, int64_t rows, int64_t k, const float* share, float* row, int8_t* to, float* scale,
                  int32_t* sum, int t, int threads) {
    const int64_t count = groups(k);
    for (int64_t m = rows * t / threads; m < rows * (t + 1) / threads; m++) {
        Some finite{};
        for (int64_t g = 0; g < count; g++) {
            const int64_t first = g * GROUP, last = std::min(k, first + GROUP);
            Some mosts{};
            for (int64_t i = first; i < last; i += 32) {
                Line line = Line::from(x + m * ldx + i) * TURN;
                turn(line);
                if (share) line = line * (Line::from(share + i) * (1.0f / 127));
                line.to(row + i);
                for (const Some& some : line.part) {
                    mosts = some > mosts ? some : mosts, mosts = -some > mosts ? -some : mosts;
                    finite += some * 0.0f;
                }
            }
            float most = 0;
            for (int i = 0; i < EACH; i++) most = mosts[i] > most ? mosts[i] : most;
            const float by = most > 1e-30f ? 127.0f / most : 0.0f;
            SomeInts all{};
            for (int64_t i = first; i < last; i += EACH) {
                SomeInts some = (SomeInts)(*(const Some*)(row + i) * by + MAGIC) - 0x4b400000;
                all += some;
                *(SomeBytes*)(to + m * k + i) = __builtin_convertvector(some, SomeBytes);
            }
            int32_t total = 0;
            for (int i = 0; i < EACH; i++) total += all[i];
            scale[m * count + g] = most * (1.0f / 127), sum[m * count + g] = total;
        }
        float off = 0;
        for (int i = 0; i < EACH; i++) off += finite[i];
        for (int64_t g = 0; g < count; g++) scale[m * count + g] += off;
    }
}

// Rows rounded to codes, with room for whole bands.
struct Rounded {
    int8_t* codes;
    float* scale;
    int32_t* sum;

    // Thread t's share of x (rows, k). False where memory ran out.
    template <typename X>
    bool round(const X* x, int64_t ldx, int64_t rows, int64_t k, const float* share, int t, int threads) const {
        static thread_local Buffer<float> row;
        if (!row.of(k)) return false;
        codes::round(x, ldx, rows, k, share, row.data, codes, scale, sum, t, threads);
        return true;
    }
    // Times a weight (columns, k) if `across`, whose rows have `share`, else (k, columns); then x has its scales already.
    CodesPart part(const int8_t* weight, int64_t ldw, bool across, int64_t k, const float* share) const {
        return {codes, scale, sum, weight, ldw, k, across, across ? share : nullptr};
    }
};

// Places for so many rows, of `numbers` in all. False where memory ran out.
struct Roundings {
    Buffer<int8_t> codes;
    Buffer<float> scales;
    Buffer<int32_t> sums;

    bool of(int64_t rows, int64_t numbers) {
        const int64_t most = numbers / DEEP * tall(rows) + 1;
        return codes.of(numbers * tall(rows) + 1) && scales.of(most) && sums.of(most);
    }
    // The one before which there are so many `numbers` to a row.
    Rounded place(int64_t rows, int64_t numbers) const {
        const int64_t before = numbers / DEEP * tall(rows);
        return {codes.data + numbers * tall(rows), scales.data + before, sums.data + before};
    }
    static int64_t tall(int64_t rows) { return (rows + HIGH - 1) / HIGH * HIGH; }
};

}  // namespace codes
}  // namespace
#endif
