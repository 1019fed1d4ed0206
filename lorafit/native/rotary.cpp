// Rotary position embedding (arXiv 2104.09864) of every head of a token, halves apart as Hugging Face models store them.
#include "common.h"

namespace {

// turn = 1 rotates, turn = -1 rotates back, which is the gradient.
template <typename T>
void rotate(const T* x, int64_t stride, const float* cos, const float* sin, T* out, int64_t tokens, int64_t heads,
            int64_t dim, float turn, int threads) {
    int64_t half = dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < tokens; i++) {
        const float *c = cos + i * dim, *s = sin + i * dim;
        for (int64_t head = 0; head < heads; head++) {
            const T* from = x + i * stride + head * dim;
            T* to = out + (i * heads + head) * dim;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float a = widen(from[j]), b = widen(from[j + half]);
                to[j] = narrow<T>(a * c[j] - turn * b * (turn > 0 ? s[j] : s[j + half]));
                to[j + half] = narrow<T>(b * c[j + half] + turn * a * (turn > 0 ? s[j + half] : s[j]));
            }
        }
    }
}

}  // namespace

#define ROTARY(NAME, T)                                                                                               \
    KERNEL int rotary_##NAME(const T* x, int64_t stride, const float* cos, const float* sin, T* out, int64_t tokens, \
                              int64_t heads, int64_t dim, float turn, int threads) {                                  \
        rotate(x, stride, cos, sin, out, tokens, heads, dim, turn, threads);                                          \
        return 0;                                                                                                     \
    }

ROTARY(f32, float)
ROTARY(bf16, bf16)
