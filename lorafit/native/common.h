// What every kernel needs: number types, an exponential that vectorises, and the share of the work that is a thread's.
//
// Kernels are plain loops that the compiler vectorises for the processor at hand (-march=native); intrinsics appear only
// where there is no other way to reach a unit (AMX tiles, products of bf16). Everything is row-major and contiguous unless a stride is given.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define LORAFIT_AMX 1
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__linux__)
#define LORAFIT_TILES 1  // of AMX, or the same done with vectors
#endif
#if defined(LORAFIT_TILES) || (defined(__AVX512VNNI__) && defined(__AVX512BW__)) || (defined(__AVXVNNI__) && defined(__AVX2__))
#define LORAFIT_CODES 1  // sums of products of 8-bit whole numbers
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define WIDE_VECTORS 1
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define INLINE inline __attribute__((always_inline))
#define APART __attribute__((noinline))  // long and called from many places: compiled once
#define KERNEL extern "C" __attribute__((visibility("default")))

namespace {

struct bf16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

template <typename T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
    return x;
}
template <>
inline bf16 narrow<bf16>(float x) {  // round to nearest, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}

// Sixteen numbers at once, in the compiler's own vector types: one register with AVX512, several with less. Loops that
// only add and multiply are left to the compiler; it does poorly on those that take exponentials.
constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(64), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias, aligned(2)));
typedef float LooseFloats __attribute__((vector_size(64), may_alias, aligned(4)));

// As many as a register holds. The compiler keeps wider ones in memory, so long loops go by these.
#if defined(WIDE_VECTORS)
constexpr int EACH = 16;
#elif defined(__AVX__)
constexpr int EACH = 8;
#else
constexpr int EACH = 4;
#endif
typedef float Some __attribute__((vector_size(4 * EACH), may_alias, aligned(4)));
typedef int32_t SomeInts __attribute__((vector_size(4 * EACH), may_alias, aligned(4)));
typedef int8_t SomeBytes __attribute__((vector_size(EACH), may_alias, aligned(1)));

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats greater(Floats a, Floats b) { return a > b ? a : b; }

INLINE float sum(Floats x) {
#ifdef WIDE_VECTORS
    return _mm512_reduce_add_ps((__m512)x);
#else
    float s = 0;
    for (int i = 0; i < 16; i++) s += x[i];
    return s;
#endif
}

INLINE float largest(Floats x) {
#ifdef WIDE_VECTORS
    return _mm512_reduce_max_ps((__m512)x);
#else
    float m = x[0];
    for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
    return m;
#endif
}

INLINE Floats widen(const float* p) { return *(const LooseFloats*)p; }
INLINE Floats widen(const bf16* p) { return (Floats)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }

// Round to nearest, ties to even; a NaN stays one.
INLINE void narrow(Floats x, float* p) { *(LooseFloats*)p = x; }
INLINE void narrow(Floats x, bf16* p) {
#ifdef __AVX512BF16__
    __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &halves, 32);
#else
    Words bits = (Words)x, nan = Words{} + 0x7fc00000u;
    bits += 0x7fffu + ((bits >> 16) & 1u);
    bits = x == x ? bits : nan;
    *(Halves*)p = __builtin_convertvector(bits >> 16, Halves);
#endif
}

// Fewer than sixteen numbers, the others zero.
template <typename X>
INLINE Floats widen_some(const X* p, int64_t count) {
    X buffer[16] = {};
    std::memcpy(buffer, p, count * sizeof(X));
    return widen(buffer);
}
template <typename X>
INLINE void narrow_some(Floats x, X* p, int64_t count) {
    X buffer[16];
    narrow(x, buffer);
    std::memcpy(p, buffer, count * sizeof(X));
}

// 16 x 16 words of 32 bits: `from` and `to` are sixteen lines each, `step` bytes apart.
APART void transpose(const void* from, int64_t from_step, void* to, int64_t to_step) {
    const char* a = (const char*)from;
    char* b = (char*)to;
#ifdef WIDE_VECTORS
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(a + i * from_step);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // r[i + c]: in quarter q, column 4q + c of the rows i to i + 3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int c = 0; c < 4; c++) {
            t[i + c] = _mm512_shuffle_i32x4(r[i + c], r[i + 4 + c], 0x88);
            t[i + 4 + c] = _mm512_shuffle_i32x4(r[i + c], r[i + 4 + c], 0xdd);
        }
    for (int c = 0; c < 8; c++) {
        _mm512_storeu_si512(b + c * to_step, _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88));
        _mm512_storeu_si512(b + (8 + c) * to_step, _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd));
    }
#else
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) std::memcpy(b + j * to_step + 4 * i, a + i * from_step + 4 * j, 4);
#endif
}

template <typename T>
struct Buffer {  // aligned scratch of a thread, kept between calls
    T* data = nullptr;
    int64_t size = 0;
    T* of(int64_t n) {
        if (n > size) {
            std::free(data);
            data = static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64));
            size = data ? n : 0;
        }
        return data;
    }
    ~Buffer() { std::free(data); }
};

// Thread t of all has these rows and columns of a product, in whole panels and bands of 32: block(m0, m1, n0, n1). Columns are shared out
// where there are enough of them (each weight is packed once), else rows. What block gives; true where nothing is left for the thread.
template <typename Block>
bool shared(int64_t rows, int64_t columns, int t, int threads, Block block) {
    int64_t panels = (columns + 31) / 32, bands = (rows + 31) / 32;
    bool by_columns = panels >= 4 * threads || bands < threads;
    int64_t units = by_columns ? panels : bands, from = units * t / threads * 32, to = units * (t + 1) / threads * 32;
    if (from >= to) return true;
    if (by_columns) return block(int64_t{0}, rows, from, to < columns ? to : columns);
    return block(from, to < rows ? to : rows, int64_t{0}, columns);
}

// exp(x) to about 2e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]. Below -87 it is 1e-38 and not 0; NaN stays NaN.
INLINE Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x;
    x = x > 88.0f ? Floats{} + 88.0f : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest whole number
    Floats n = shifted - 12582912.0f;
    Floats r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return p * (Floats)(((Ints)shifted - 0x4b400000 + 127) << 23);
}

// 1/x for x of ordinary size: an estimate and one step of Newton's, four times as fast as the processor's division.
INLINE Floats reciprocal(Floats x) {
#ifdef __AVX512F__
    Floats r = (Floats)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

}  // namespace

#ifdef LORAFIT_AMX
#include <sys/syscall.h>
#include <unistd.h>

// Eight tiles of 16 rows of 64 bytes. The compiler's own intrinsics are macros and tell it too little about memory.
namespace tiles {

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    Config() {
        for (int i = 0; i < 8; i++) bytes[i] = 64, rows[i] = 16;
    }
};

inline bool permitted() {  // asked of the kernel once a process
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}
inline void configure() {
    Config config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void release() { __asm__ volatile("tilerelease" : : : "memory"); }
template <int T>
inline void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
inline void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void stream(const void* p, int64_t stride) {  // load, with the hint that the lines aren't needed near
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int D, int A>
inline void multiply() {  // C += A·B and D += A·B', for B and B' in tiles 6 and 7
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(6));
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(D), "i"(A), "i"(7));
}
template <int C, int D, int A>
inline void multiply_codes() {  // the same of 8-bit whole numbers, A's with a sign, B's without
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(6));
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(D), "i"(A), "i"(7));
}

// The sums of BANDS bands of 16 rows and 32 columns: C = (or += where ADD) sum over `lines` of A·B. A band of A is a tile of its
// own, `a_band` numbers from the last; the columns of B and C are in two halves; the steps are numbers from line to line,
// `ldc` those from row to row.
template <int BANDS, bool ADD>
INLINE void sum(const bf16* a, int64_t a_band, int64_t a_step, const bf16* left, const bf16* right, int64_t b_step, int64_t lines,
                float* c_left, float* c_right, int64_t ldc) {
    if constexpr (ADD) {
        load<0>(c_left, ldc * 4), load<1>(c_right, ldc * 4);
        if constexpr (BANDS > 1) load<2>(c_left + 16 * ldc, ldc * 4), load<3>(c_right + 16 * ldc, ldc * 4);
    } else {
        zero<0>(), zero<1>();
        if constexpr (BANDS > 1) zero<2>(), zero<3>();
    }
    for (; lines > 0; lines--, a += a_step, left += b_step, right += b_step) {
        load<4>(a, 64), load<6>(left, 64), load<7>(right, 64);
        if constexpr (BANDS > 1) load<5>(a + a_band, 64);
        multiply<0, 1, 4>();
        if constexpr (BANDS > 1) multiply<2, 3, 5>();
    }
    store<0>(c_left, ldc * 4), store<1>(c_right, ldc * 4);
    if constexpr (BANDS > 1) store<2>(c_left + 16 * ldc, ldc * 4), store<3>(c_right + 16 * ldc, ldc * 4);
}

}  // namespace tiles
#elif defined(LORAFIT_TILES)

// The same for a processor that multiplies bf16 in vectors: the sums of eight rows at a time stay in registers.
namespace tiles {

inline bool permitted() { return true; }
inline void configure() {}
inline void release() {}

constexpr int ROWS = 8;  // of 32 columns: 16 of the 32 registers
struct Sums {
    __m512 left[ROWS], right[ROWS];

    INLINE void begin() {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) left[i] = right[i] = _mm512_setzero_ps();
    }
    INLINE void load(const float* c_left, const float* c_right, int64_t ldc) {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) left[i] = _mm512_loadu_ps(c_left + i * ldc), right[i] = _mm512_loadu_ps(c_right + i * ldc);
    }
    INLINE void store(float* c_left, float* c_right, int64_t ldc) const {
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) _mm512_storeu_ps(c_left + i * ldc, left[i]), _mm512_storeu_ps(c_right + i * ldc, right[i]);
    }
    // Eight rows of A, 32 deep, times two tiles of B.
    INLINE void add(const bf16* a, int64_t lda, const bf16* b_left, const bf16* b_right) {
        for (int k = 0; k < 32; k += 2, b_left += 32, b_right += 32) {
            __m512bh b = (__m512bh)_mm512_load_si512(b_left), b2 = (__m512bh)_mm512_load_si512(b_right);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++) {
                int pair;
                std::memcpy(&pair, a + i * lda + k, 4);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                left[i] = _mm512_dpbf16_ps(left[i], both, b);
                right[i] = _mm512_dpbf16_ps(right[i], both, b2);
            }
        }
    }
};

template <int BANDS, bool ADD>
INLINE void sum(const bf16* a, int64_t a_band, int64_t a_step, const bf16* left, const bf16* right, int64_t b_step, int64_t lines,
                float* c_left, float* c_right, int64_t ldc) {
    for (int row = 0; row < 16 * BANDS; row += ROWS) {
        const bf16* rows = a + row / 16 * a_band + row % 16 * 32;
        Sums sums;
        if constexpr (ADD)
            sums.load(c_left + row * ldc, c_right + row * ldc, ldc);
        else
            sums.begin();
        for (int64_t line = 0; line < lines; line++)
            sums.add(rows + line * a_step, 32, left + line * b_step, right + line * b_step);
        sums.store(c_left + row * ldc, c_right + row * ldc, ldc);
    }
}

}  // namespace tiles
#endif
