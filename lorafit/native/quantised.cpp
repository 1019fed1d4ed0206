// Weights to 4 bits, from 4 or 8 bits back to numbers, and products of a few rows with them, see quantised.py. Sums and products are those of the twin, rounding by rounding.
#include "common.h"

namespace {

constexpr int64_t BLOCK = 64, NESTED = 256;

// A thread's share of the blocks is a whole number of these, so that no byte of `codes` is read by two.
constexpr int64_t TOGETHER = 64;

// size·nested + offset, both rounded. `volatile`, because the compiler would make one operation of them that rounds once.
inline float scale_of(const float* plain, const uint8_t* coded, const float* sizes, const float* nested, const float* offset,
                      int64_t block) {
    if (plain) return plain[block];
    volatile float size = sizes[coded[block]] * nested[block / NESTED];
    return size + *offset;
}

// A block's 64 numbers from its 32 bytes: its sixteen possible numbers are computed once and then looked up.
#ifdef WIDE_VECTORS
inline void whole_block(const uint8_t* codes, const float* table, float scale, float* to) {
    __m512 some = _mm512_mul_ps(_mm512_loadu_ps(table), _mm512_set1_ps(scale));
    for (int i = 0; i < 4; i++) {
        __m128i bytes = _mm_loadl_epi64((const __m128i*)(codes + 8 * i)), low = _mm_set1_epi8(15);
        __m128i each = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), _mm_and_si128(bytes, low));
        _mm512_storeu_ps(to + 16 * i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(each), some));
    }
}
inline void whole_block(const uint8_t* codes, const float* table, float scale, bf16* to) {
    alignas(32) bf16 narrowed[16];
    narrow(widen(table) * scale, narrowed);
    __m512i some = _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)narrowed));
    for (int i = 0; i < 2; i++) {
        // A byte in each pair of 16-bit places: its upper half in the first; in the second the whole, of which the look-up
        // takes five bits, and the table is there twice.
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * i)));
        __m512i each = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
        _mm512_storeu_si512(to + 32 * i, _mm512_permutexvar_epi16(each, some));
    }
}
#else
template <typename T>
inline void whole_block(const uint8_t* codes, const float* table, float scale, T* to) {
    T some[16];
    for (int i = 0; i < 16; i++) some[i] = narrow<T>(table[i] * scale);
    for (int i = 0; i < BLOCK / 2; i++) to[2 * i] = some[codes[i] >> 4], to[2 * i + 1] = some[codes[i] & 15];
}
#endif

// Codes of numbers: how many of the middles between the table's values a share exceeds, turned into a code by `order`.
template <typename T>
void to_four_bits(const T* from, const float* middles, const uint8_t* order, uint8_t* codes, float* absmax, int64_t numbers,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < (numbers + BLOCK - 1) / BLOCK; block++) {
        int64_t first = block * BLOCK, count = numbers - first < BLOCK ? numbers - first : BLOCK;
        alignas(64) float shares[BLOCK] = {};
        alignas(64) int32_t exceeded[BLOCK];
        Floats mosts{}, finite{};
        for (int64_t i = 0; i < count; i += LANES) {
            Floats x = count - i < LANES ? widen_some(from + first + i, count - i) : widen(from + first + i);
            mosts = greater(x, mosts), mosts = greater(-x, mosts);
            finite += x * 0.0f;  // a NaN once one of them isn't
            narrow(x, shares + i);
        }
        float most = largest(mosts), least = most > 1e-38f ? most : 1e-38f, inverse = 1.0f / least;
        absmax[block] = (count == BLOCK ? most : least) + sum(finite);
        for (int64_t i = 0; i < BLOCK; i += LANES) {
            Floats x = widen(shares + i);
            x = count == BLOCK ? x * inverse : x / least;
            Ints more{};
            for (int m = 0; m < 15; m++) more -= (Ints)(x > middles[m]);
            std::memcpy(exceeded + i, &more, sizeof more);
        }
        for (int64_t i = 0; i < (count + 1) / 2; i++)
            codes[first / 2 + i] = order[exceeded[2 * i]] << 4 | order[exceeded[2 * i + 1]];
    }
}

template <typename T>
void four_bits(const uint8_t* codes, const float* table, const float* plain, const uint8_t* coded, const float* nested,
               const float* offset, const float* sizes, T* to, int64_t numbers, int threads) {
    int64_t shares = (numbers + BLOCK * TOGETHER - 1) / (BLOCK * TOGETHER);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t share = 0; share < shares; share++)
        for (int64_t block = share * TOGETHER; block < (share + 1) * TOGETHER && block * BLOCK < numbers; block++) {
            float scale = scale_of(plain, coded, sizes, nested, offset, block);
            int64_t first = block * BLOCK, count = numbers - first < BLOCK ? numbers - first : BLOCK;
            const uint8_t* from = codes + first / 2;
            if (count == BLOCK) {
                whole_block(from, table, scale, to + first);
                continue;
            }
            for (int64_t i = 0; i < count; i++)
                to[first + i] = narrow<T>(table[i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4] * scale);
        }
}

// acc += the products of 64 numbers with those of x.
#ifdef __AVX512BF16__
inline void add_products(const bf16* numbers, const bf16* x, Floats& acc) {
    for (int i = 0; i < 2; i++)
        acc = (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(numbers + 32 * i),
                                       (__m512bh)_mm512_loadu_si512(x + 32 * i));
}
#else
inline void add_products(const bf16* numbers, const bf16* x, Floats& acc) {
    for (int i = 0; i < BLOCK; i += LANES) acc += widen(numbers + i) * widen(x + i);
}
#endif
inline void add_products(const float* numbers, const float* x, Floats& acc) {
    for (int i = 0; i < BLOCK; i += LANES) acc += widen(numbers + i) * widen(x + i);
}

// y = x·Wᵀ + bias for R rows x (R, width); a block's numbers are used as soon as they are made. Rows of W are whole blocks.
template <typename T, int R>
void few_rows(const uint8_t* codes, const float* table, const float* plain, const uint8_t* coded, const float* nested,
              const float* offset, const float* sizes, const T* x, const T* bias, T* y, int64_t width, int64_t out,
              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < out; row++) {
        alignas(64) T numbers[BLOCK];
        Floats acc[R] = {};
        for (int64_t at = 0; at < width; at += BLOCK) {
            int64_t block = (row * width + at) / BLOCK;
            whole_block(codes + block * (BLOCK / 2), table, scale_of(plain, coded, sizes, nested, offset, block), numbers);
            for (int r = 0; r < R; r++) add_products(numbers, x + r * width + at, acc[r]);
        }
        for (int r = 0; r < R; r++) y[r * out + row] = narrow<T>(sum(acc[r]) + (bias ? widen(bias[row]) : 0.0f));
    }
}

template <typename T>
void some_rows(const uint8_t* codes, const float* table, const float* plain, const uint8_t* coded, const float* nested,
               const float* offset, const float* sizes, const T* x, const T* bias, T* y, int64_t rows, int64_t width,
               int64_t out, int threads) {
    for (int64_t r = 0; r < rows; r += 4, x += 4 * width, y += 4 * out) {
        auto run = rows - r == 1 ? few_rows<T, 1> : rows - r == 2 ? few_rows<T, 2> : rows - r == 3 ? few_rows<T, 3> : few_rows<T, 4>;
        run(codes, table, plain, coded, nested, offset, sizes, x, bias, y, width, out, threads);
    }
}

template <typename T>
void eight_bits(const int8_t* codes, const float* absmax, T* to, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
#pragma omp simd
        for (int64_t i = 0; i < width; i++)
            to[row * width + i] = narrow<T>(codes[row * width + i] * absmax[row] * (1.0f / 127));
}

}  // namespace

#define QUANTISED(NAME, T)                                                                                             \
    KERNEL int quantise_four_bits_##NAME(const T* from, const float* middles, const uint8_t* order, uint8_t* codes,    \
                                         float* absmax, int64_t numbers, int threads) {                                \
        to_four_bits(from, middles, order, codes, absmax, numbers, threads);                                           \
        return 0;                                                                                                      \
    }                                                                                                                  \
    KERNEL int dequantise_four_bits_##NAME(const uint8_t* codes, const float* table, const float* plain,               \
                                           const uint8_t* coded, const float* nested, const float* offset,             \
                                           const float* sizes, T* to, int64_t numbers, int threads) {                  \
        four_bits(codes, table, plain, coded, nested, offset, sizes, to, numbers, threads);                            \
        return 0;                                                                                                      \
    }                                                                                                                  \
    KERNEL int few_rows_##NAME(const uint8_t* codes, const float* table, const float* plain, const uint8_t* coded,     \
                               const float* nested, const float* offset, const float* sizes, const T* x,               \
                               const T* bias, T* y, int64_t rows, int64_t width, int64_t out, int threads) {           \
        some_rows(codes, table, plain, coded, nested, offset, sizes, x, bias, y, rows, width, out, threads);           \
        return 0;                                                                                                      \
    }                                                                                                                  \
    KERNEL int dequantise_eight_bits_##NAME(const int8_t* codes, const float* absmax, T* to, int64_t rows,             \
                                            int64_t width, int threads) {                                              \
        eight_bits(codes, absmax, to, rows, width, threads);                                                           \
        return 0;                                                                                                      \
    }

QUANTISED(f32, float)
QUANTISED(bf16, bf16)
