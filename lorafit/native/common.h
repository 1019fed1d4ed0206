// What every kernel needs: number types, an exponential that vectorises, and the share of the work that is a thread's.
//
// Kernels are plain loops that the compiler vectorises for the processor at hand (-march=native); intrinsics appear only
// where there is no other way to reach a unit (AMX tiles). Everything is row-major and contiguous unless a stride is given.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define LORAFIT_AMX 1
#endif

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
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

inline Lanes get(const float* p) {
    Lanes x;
    std::memcpy(&x, p, 64);
    return x;
}
inline Lanes get(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, 32);
    return (Lanes)(__builtin_convertvector(h, Bits) << 16);
}
inline void put(float* p, Lanes x) { std::memcpy(p, &x, 64); }
inline void put(bf16* p, Lanes x) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &h, 32);
#else
    Bits bits = (Bits)x, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Halves h = __builtin_convertvector(x != x ? Bits{} + 0x7fc0u : rounded, Halves);
    std::memcpy(p, &h, 32);
#endif
}

// The last numbers of a row, fewer than LANES: the rest of the register is `fill`.
template <typename T>
Lanes get(const T* p, int64_t count, float fill) {
    float some[LANES];
    for (int64_t i = 0; i < LANES; i++) some[i] = i < count ? widen(p[i]) : fill;
    return get(some);
}
template <typename T>
void put(T* p, Lanes x, int64_t count) {
    for (int64_t i = 0; i < count; i++) p[i] = narrow<T>(x[i]);
}

// exp(x) to about 2e-7 relative: 2^n times a polynomial on [-ln2/2, ln2/2]. Below -87 it is 1e-38 and not 0; NaN stays NaN.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest whole number
    Lanes n = shifted - 12582912.0f;
    Lanes r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Lanes p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    return p * (Lanes)(((Words)shifted - 0x4b400000 + 127) << 23);
}

// 1/x for x of ordinary size: an estimate and one step of Newton's, four times as fast as the processor's division.
inline Lanes reciprocal(Lanes x) {
#ifdef __AVX512F__
    Lanes r = (Lanes)_mm512_rcp14_ps((__m512)x);
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

inline float sum(Lanes x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
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
inline void store(void* p, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void multiply() {  // C += A·B
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

}  // namespace tiles
#endif
