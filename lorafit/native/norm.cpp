// RMS norm (arXiv 1910.07467) of the sum of two rows, forward and backward, a row at a time.
#include "common.h"

namespace {

template <typename T>
void forward(const T* x, const T* y, const T* gain, T* sum, T* out, float* rstd, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T* row = x + i * width;
        float squares = 0;
        if (y) {
            const T* other = y + i * width;
            T* both = sum + i * width;
#pragma omp simd reduction(+ : squares)
            for (int64_t j = 0; j < width; j++) {
                both[j] = narrow<T>(widen(row[j]) + widen(other[j]));
                float s = widen(both[j]);
                squares += s * s;
            }
            row = both;
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t j = 0; j < width; j++) squares += widen(row[j]) * widen(row[j]);
        }
        float r = 1.0f / std::sqrt(squares / width + eps);
        rstd[i] = r;
        T* to = out + i * width;
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = narrow<T>(widen(row[j]) * r * widen(gain[j]));
    }
}

// The normalised rows once more, from what the forward kept.
template <typename T>
void again(const T* x, const T* gain, const float* rstd, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T* row = x + i * width;
        T* to = out + i * width;
        float r = rstd[i];
#pragma omp simd
        for (int64_t j = 0; j < width; j++) to[j] = narrow<T>(widen(row[j]) * r * widen(gain[j]));
    }
}

// dx = rest + r (g - x^ mean(g x^)), with g = gain dout, x^ = r x; `rest` is what reaches the sum past the norm.
template <typename T>
void backward(const T* dout, const T* rest, const T* x, const T* gain, const float* rstd, T* dx, int64_t rows,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const T *d = dout + i * width, *row = x + i * width;
        T* to = dx + i * width;
        float r = rstd[i], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; j++) dot += widen(d[j]) * widen(gain[j]) * widen(row[j]);
        float mean = dot * r * r / width;
        if (rest) {
            const T* past = rest + i * width;
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                float g = widen(d[j]) * widen(gain[j]);
                to[j] = narrow<T>(widen(past[j]) + r * (g - widen(row[j]) * mean));
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < width; j++) {
                float g = widen(d[j]) * widen(gain[j]);
                to[j] = narrow<T>(r * (g - widen(row[j]) * mean));
            }
        }
    }
}

}  // namespace

#define RMS_NORM(NAME, T)                                                                                              \
    KERNEL int rms_norm_##NAME(const T* x, const T* y, const T* gain, T* sum, T* out, float* rstd, int64_t rows,      \
                                int64_t width, float eps, int threads) {                                 \
        forward(x, y, gain, sum, out, rstd, rows, width, eps, threads);                                       \
        return 0;                                                                                                     \
    }                                                                                                                  \
    KERNEL int rms_norm_again_##NAME(const T* x, const T* gain, const float* rstd, T* out, int64_t rows,              \
                                      int64_t width, int threads) {                                      \
        again(x, gain, rstd, out, rows, width, threads);                                                      \
        return 0;                                                                                                     \
    }                                                                                                                  \
    KERNEL int rms_norm_backward_##NAME(const T* dout, const T* rest, const T* x, const T* gain, const float* rstd,   \
                                         T* dx, int64_t rows, int64_t width, int threads) {              \
        backward(dout, rest, x, gain, rstd, dx, rows, width, threads);                                        \
        return 0;                                                                                                     \
    }

RMS_NORM(f32, float)
RMS_NORM(bf16, bf16)
