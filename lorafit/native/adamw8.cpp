// AdamW's update of a tensor whose averages are codes of 8 bits, see adamw8.py. Sums and products are those of the twin,
// rounding by rounding: none may be made one operation of, which rounds once.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "common.h"

namespace {

constexpr int64_t BLOCK = 256;
constexpr int64_t ALONE = 1 << 14;  // numbers below which other threads aren't worth waking

// A type's values by code; the least code of numbers that share their upper 16 bits; the middle between a code's value and the
// next one's.
struct Type {
    const float* values;
    const uint8_t* lower;
    const float* middles;
};

INLINE void read(const uint8_t* codes, float absmax, const Type& type, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = type.values[codes[i]] * absmax;
}

INLINE void write(const float* from, const Type& type, uint8_t* codes, float& absmax, int64_t count) {
    Floats mosts{};
    for (int64_t i = 0; i < BLOCK; i += LANES) {
        Floats x = *(const Floats*)(from + i);
        mosts = greater(x, mosts), mosts = greater(-x, mosts);
    }
    absmax = largest(mosts);
    const float least = absmax > 1e-38f ? absmax : 1e-38f;
    alignas(64) float shares[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) shares[i] = from[i] / least;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, shares + i, 4);
        const uint8_t code = type.lower[(bits >> 16) ^ 0x8000u];
        codes[i] = code + (shares[i] > type.middles[code]);
    }
}

void update(float* numbers, const float* gradient, uint8_t* mean_codes, float* mean_absmax, uint8_t* square_codes,
            float* square_absmax, const Type& signs, const Type& plain, int64_t count, float beta1, float rest1, float beta2,
            float rest2, float eps, float decay, float spread, float pace, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > ALONE)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        const int64_t first = block * BLOCK, here = count - first < BLOCK ? count - first : BLOCK;
        alignas(64) float mean[BLOCK] = {}, square[BLOCK] = {};
        read(mean_codes + first, mean_absmax[block], signs, mean, here);
        read(square_codes + first, square_absmax[block], plain, square, here);
        const float* g = gradient + first;
        float* x = numbers + first;
        for (int64_t i = 0; i < here; i++) {
            mean[i] = mean[i] * beta1 + g[i] * rest1;
            square[i] = square[i] * beta2 + (g[i] * g[i]) * rest2;
            x[i] = x[i] * decay + (mean[i] * pace) / (std::sqrt(square[i]) / spread + eps);
        }
        write(mean, signs, mean_codes + first, mean_absmax[block], here);
        write(square, plain, square_codes + first, square_absmax[block], here);
    }
}

}  // namespace

KERNEL int adamw8_f32(float* numbers, const float* gradient, uint8_t* mean_codes, float* mean_absmax, uint8_t* square_codes,
                      float* square_absmax, const float* values, const uint8_t* lower, const float* middles,
                      const float* plain_values, const uint8_t* plain_lower, const float* plain_middles, int64_t count,
                      float beta1, float rest1, float beta2, float rest2, float eps, float decay, float spread, float pace,
                      int threads) {
    update(numbers, gradient, mean_codes, mean_absmax, square_codes, square_absmax, {values, lower, middles},
           {plain_values, plain_lower, plain_middles}, count, beta1, rest1, beta2, rest2, eps, decay, spread, pace, threads);
    return 0;
}
