// AdamW's update of many tensors in one call, and the norm of many gradients, see adamw.py: an adapter has hundreds of small ones,
// and for each of them alone the call takes as long as the numbers.
#include <algorithm>

#include "common.h"

extern "C" {

struct Item {
    float* numbers;
    float* gradient;
    float* mean;
    float* square;
    int64_t count;
};
}

namespace {

// Thread t's share of the numbers of all items: job(item, first, last) for each piece of it.
template <typename Job>
void share(const Item* items, int64_t many, int t, int threads, Job job) {
    int64_t all = 0, at = 0;
    for (int64_t i = 0; i < many; i++) all += items[i].count;
    const int64_t from = all * t / threads, to = all * (t + 1) / threads;
    for (int64_t i = 0; i < many; at += items[i].count, i++) {
        const int64_t first = std::max<int64_t>(0, from - at), last = std::min(items[i].count, to - at);
        if (first < last) job(items[i], first, last);
    }
}

// Squares of a few thousand numbers at a time in fp32, sixteen sums of them, and the sum of those in double.
double squares(const float* x, int64_t count) {
    constexpr int64_t PIECE = 4096;
    double found = 0;
    for (int64_t from = 0; from < count; from += PIECE) {
        const int64_t to = std::min(count, from + PIECE);
        Floats sums{};
        int64_t i = from;
        for (; i + LANES <= to; i += LANES) {
            const Floats some = widen(x + i);
            sums += some * some;
        }
        if (i < to) {
            const Floats some = widen_some(x + i, to - i);
            sums += some * some;
        }
        for (int64_t lane = 0; lane < LANES; lane++) found += sums[lane];
    }
    return found;
}

// A function of its own, so that the compiler believes that the four don't overlap, and vectorises.
APART void update(float* __restrict__ x, const float* __restrict__ g, float* __restrict__ mean, float* __restrict__ square,
                  int64_t count, float beta1, float rest1, float beta2, float rest2, float eps, float decay, float spread, float pace) {
    for (int64_t i = 0; i < count; i++) {
        mean[i] = mean[i] * beta1 + g[i] * rest1;
        square[i] = square[i] * beta2 + g[i] * g[i] * rest2;
        x[i] = x[i] * decay + mean[i] * pace / (std::sqrt(square[i]) / spread + eps);
    }
}

}  // namespace

// The sum of the squares of all gradients.
KERNEL int sum_squares_f32(const Item* items, int64_t many, double* found, int threads) {
    double sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum)
    for (int t = 0; t < threads; t++)
        share(items, many, t, threads,
              [&](const Item& item, int64_t first, int64_t last) { sum += squares(item.gradient + first, last - first); });
    *found = sum;
    return 0;
}

// All gradients times a factor.
KERNEL int scale_f32(const Item* items, int64_t many, float factor, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++)
        share(items, many, t, threads, [&](const Item& item, int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) item.gradient[i] *= factor;
        });
    return 0;
}

KERNEL int adamw_f32(const Item* items, int64_t many, float beta1, float rest1, float beta2, float rest2, float eps, float decay,
                     float spread, float pace, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int t = 0; t < threads; t++)
        share(items, many, t, threads, [&](const Item& item, int64_t first, int64_t last) {
            update(item.numbers + first, item.gradient + first, item.mean + first, item.square + first, last - first, beta1, rest1,
                   beta2, rest2, eps, decay, spread, pace);
        });
    return 0;
}
