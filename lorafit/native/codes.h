// Products of 8-bit whole numbers, see rounded.py: both sides are turned by blocks of 32, so that no number stands out, and rounded row by
// row; sums of their products are exact, and are turned back.
//
// Everything here is the work of one thread.
#pragma once
#include "common.h"

#ifdef LORAFIT_TILES
#include <algorithm>

// One part of a sum: codes a (rows, k), each row with a scale and the sum of its codes; a weight's codes b (columns, k) if `across`
// (A·Bᵀ), else (k, columns), with stride ldb. k and columns are multiples of 64. `scale` of each column, over 127, or null. a has
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

namespace codes {

constexpr int64_t DEEP = 64, TILE = 1024;  // bytes in a tile: 16 lines of 16 columns, 4 codes deep
constexpr float TURN = 0.17677669529663687f;  // 1/sqrt(32)

// The Hadamard transform of 32 numbers, times sqrt(32): its own inverse but for 32.
INLINE void turn(__m512& a, __m512& b) {
    auto half = [](__m512& x) {
        auto swap = [&x](__m512 other, __mmask16 minus) { x = _mm512_add_ps(other, _mm512_mask_sub_ps(x, minus, _mm512_setzero_ps(), x)); };
        swap(_mm512_shuffle_f32x4(x, x, 0x4e), 0xff00);
        swap(_mm512_shuffle_f32x4(x, x, 0xb1), 0xf0f0);
        swap(_mm512_permute_ps(x, 0x4e), 0xcccc);
        swap(_mm512_permute_ps(x, 0xb1), 0xaaaa);
    };
    __m512 sum = _mm512_add_ps(a, b);
    b = _mm512_sub_ps(a, b), a = sum;
    half(a), half(b);
}

// Columns c..c+16 of b, DEEP deep, as a tile. The processor multiplies numbers with a sign by numbers without: a weight's codes are
// stored with 128 more, and what that adds is taken off again by way of `a_sum`.
inline void pack(const CodesPart& part, int64_t k, int64_t column, uint8_t* tile) {
    const __m512i more = _mm512_set1_epi8(-128);
    const int64_t ldb = part.ldb;
    if (part.across) {
        transpose(part.b + column * ldb + k, ldb, tile, 64);
        for (int i = 0; i < 16; i++)
            _mm512_store_si512(tile + 64 * i, _mm512_xor_si512(_mm512_load_si512(tile + 64 * i), more));
        return;
    }
    const int8_t* b = part.b + k * ldb + column;
    for (int i = 0; i < 16; i++, b += 4 * ldb) {
        auto row = [&](int64_t r) { return _mm_loadu_si128((const __m128i*)(b + r * ldb)); };
        __m128i low = _mm_unpacklo_epi8(row(0), row(1)), low2 = _mm_unpacklo_epi8(row(2), row(3));
        __m128i high = _mm_unpackhi_epi8(row(0), row(1)), high2 = _mm_unpackhi_epi8(row(2), row(3));
        __m512i line = _mm512_castsi128_si512(_mm_unpacklo_epi16(low, low2));
        line = _mm512_inserti32x4(line, _mm_unpackhi_epi16(low, low2), 1);
        line = _mm512_inserti32x4(line, _mm_unpacklo_epi16(high, high2), 2);
        line = _mm512_inserti32x4(line, _mm_unpackhi_epi16(high, high2), 3);
        _mm512_store_si512(tile + 64 * i, _mm512_xor_si512(line, more));
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
#else
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
#endif

// The rows m..m+tall of a part, times the 32 columns from `column` on that are packed in b: into `sums` (32, 32), or on top of them.
inline void add(const CodesPart& part, const uint8_t* b, int64_t m, int64_t tall, int64_t column, bool begin, float* sums) {
    alignas(64) int32_t whole[32 * 32];
    multiply(part.a + m * part.k, part.k, b, part.k / DEEP, tall, whole);
    __m512 left = _mm512_set1_ps(TURN), right = left;
    if (part.scale) {
        const __m512 share = _mm512_set1_ps(TURN / 127);
        left = _mm512_mul_ps(_mm512_loadu_ps(part.scale + column), share);
        right = _mm512_mul_ps(_mm512_loadu_ps(part.scale + column + 16), share);
    }
    for (int64_t i = 0; i < tall; i++) {
        const __m512i more = _mm512_set1_epi32(part.a_sum[m + i] * 128);
        const __m512 scale = _mm512_set1_ps(part.a_scale[m + i]);
        auto number = [&](int64_t half) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(whole + i * 32 + half), more)); };
        __m512 x = _mm512_mul_ps(number(0), _mm512_mul_ps(left, scale)), y = _mm512_mul_ps(number(16), _mm512_mul_ps(right, scale));
        turn(x, y);
        float* to = sums + i * 32;
        _mm512_storeu_ps(to, begin ? x : _mm512_add_ps(x, _mm512_loadu_ps(to)));
        _mm512_storeu_ps(to + 16, begin ? y : _mm512_add_ps(y, _mm512_loadu_ps(to + 16)));
    }
}

// Thread t's share of the rows of x (rows, k), turned, each number then times that of `share` over 127 for its column if there is one:
// codes, scales and sums. What isn't finite makes its row's scale so. `row` has room for k numbers.
inline void round(const bf16* x, int64_t ldx, int64_t rows, int64_t k, const float* share, float* row, int8_t* to, float* scale,
                  int32_t* sum, int t, int threads) {
    for (int64_t m = rows * t / threads; m < rows * (t + 1) / threads; m++) {
        Floats mosts{}, finite{};
        for (int64_t i = 0; i < k; i += 32) {
            __m512 a = (__m512)(widen(x + m * ldx + i) * TURN), b = (__m512)(widen(x + m * ldx + i + 16) * TURN);
            turn(a, b);
            Floats both[2] = {(Floats)a, (Floats)b};
            for (int half = 0; half < 2; half++) {
                Floats some = share ? both[half] * (widen(share + i + 16 * half) * (1.0f / 127)) : both[half];
                mosts = greater(some, mosts), mosts = greater(-some, mosts);
                finite += some * 0.0f;
                narrow(some, row + i + 16 * half);
            }
        }
        float most = largest(mosts), by = most > 1e-30f ? 127.0f / most : 0.0f;
        scale[m] = most * (1.0f / 127) + ::sum(finite);
        __m512i all = _mm512_setzero_si512();
        for (int64_t i = 0; i < k; i += 16) {
            __m512i some = _mm512_cvtps_epi32((__m512)(widen(row + i) * by));
            all = _mm512_add_epi32(all, some);
            _mm_storeu_si128((__m128i*)(to + m * k + i), _mm512_cvtepi32_epi8(some));
        }
        sum[m] = _mm512_reduce_add_epi32(all);
    }
}

}  // namespace codes
#endif
