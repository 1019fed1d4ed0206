// Logits of a chunk of tokens to losses and exponentials in one sweep, in place.
#include "common.h"

namespace {

// The last logits of a row, and so small ones after them that they count for nothing.
template <typename T>
Floats tail(const T* row, int64_t count) {
    Floats x = widen_some(row, count);
    for (int64_t j = count; j < LANES; j++) x[j] = -INFINITY;
    return x;
}

// Row i: loss = log(sum exp(x)) - x[label]; x becomes exp(x - max), less their sum at the label; inverse = 1 / that sum.
// So x * inverse is the gradient of the loss, and the difference at the label is taken before anything is rounded.
template <typename T>
void exponentials(T* logits, int64_t stride, const int64_t* labels, float* loss, float* inverse, int64_t rows,
                  int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        T* row = logits + i * stride;
        int64_t whole = width / LANES * LANES, rest = width - whole;
        float target = widen(row[labels[i]]), top = -INFINITY;
        Floats most = Floats{} - INFINITY, sums = {};
        for (int64_t j = 0; j < whole; j += LANES) {
            Floats x = widen(row + j);
            most = x > most ? x : most;
        }
        if (rest) {
            Floats x = tail(row + whole, rest);
            most = x > most ? x : most;
        }
        for (int j = 0; j < LANES; j++) top = most[j] > top ? most[j] : top;
        for (int64_t j = 0; j < whole; j += LANES) {
            Floats e = exponential(widen(row + j) - top);
            sums += e;
            narrow(e, row + j);
        }
        if (rest) {
            Floats e = exponential(tail(row + whole, rest) - top);
            for (int j = rest; j < LANES; j++) e[j] = 0;
            sums += e;
            narrow_some(e, row + whole, rest);
        }
        float total = sum(sums), own = exponential(Floats{} + (target - top))[0];
        row[labels[i]] = narrow<T>(own - total);
        loss[i] = std::log(total) + top - target;
        inverse[i] = 1.0f / total;
    }
}

}  // namespace

#define LOSS(NAME, T)                                                                                                 \
    KERNEL int exponentials_##NAME(T* logits, int64_t stride, const int64_t* labels, float* loss, float* inverse,     \
                                   int64_t rows, int64_t width, int threads) {                                        \
        exponentials(logits, stride, labels, loss, inverse, rows, width, threads);                                    \
        return 0;                                                                                                     \
    }

LOSS(f32, float)
LOSS(bf16, bf16)
