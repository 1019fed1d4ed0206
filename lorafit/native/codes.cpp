// Products in 8 bits of inputs in fp32, for processors that multiply no bf16: what lowrank.cpp does of bf16, without additions.
#include "codes.h"

#ifdef LORAFIT_CODES
extern "C" {

// y (rows, columns) = x·Wᵀ for W (columns, k) if `across`, whose rows have `share`, else x·W for W (k, columns); on top of y where there is
// `more`.
struct Coded {
    const int8_t* weight;
    int64_t ldw, across;
    const float* share;
    float* y;
    int64_t ldy, columns, more;
};
}

namespace {

constexpr int64_t WIDE = 32, SLICE = 512 * 1024;  // columns of a panel; bytes of panels that are packed at a time

// Rows m0..m1 and columns n0..n1 of y, by one thread. False where memory ran out.
bool block(const CodesPart& part, const Coded& to, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    static thread_local Buffer<uint8_t> packed_;
    int64_t most = std::max<int64_t>(1, SLICE / (part.k * WIDE)), panel = part.k * WIDE;
    uint8_t* packed = packed_.of(std::min(most, (n1 - n0) / WIDE) * panel);
    if (!packed) return false;
    for (int64_t n = n0; n < n1; n += most * WIDE) {
        int64_t end = std::min(n1, n + most * WIDE);
        for (int64_t column = n; column < end; column += WIDE)
            codes::pack_panel(part, column, packed + (column - n) / WIDE * panel);
        for (int64_t m = m0; m < m1; m += codes::HIGH)
            for (int64_t column = n; column < end; column += WIDE) {
                alignas(64) float sums[codes::HIGH * WIDE];
                int64_t tall = std::min(codes::HIGH, m1 - m);
                codes::add(part, packed + (column - n) / WIDE * panel, m, tall, column, true, sums);
                for (int64_t i = 0; i < tall; i++) {
                    float* y = to.y + (m + i) * to.ldy + column;
                    codes::Line line = codes::Line::from(sums + i * WIDE);
                    (to.more ? line + codes::Line::from(y) : line).to(y);
                }
            }
    }
    return true;
}

// Thread t's share. False where memory ran out.
bool share(const CodesPart& part, const Coded& to, int64_t rows, int t, int threads) {
    return shared(rows, to.columns, t, threads,
                  [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) { return block(part, to, m0, m1, n0, n1); });
}

}  // namespace

// x (rows, k) is rounded once for all products, each number times that of `scales` for its column if there are any. Returns 0, or 1
// where scratch memory ran out.
KERNEL int coded_products_f32(const float* x, int64_t ldx, int64_t rows, int64_t k, const float* scales, const Coded* products,
                              int64_t count, int threads) {
    static thread_local codes::Roundings kept;
    if (!kept.of(rows, k)) return 1;
    const codes::Rounded rounded = kept.place(rows, 0);
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
#ifdef LORAFIT_TILES
        tiles::configure();
#endif
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) fine = rounded.round(x, ldx, rows, k, scales, t, threads) && fine;
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++)
            for (const Coded* to = products; to < products + count; to++)
                fine = share(rounded.part(to->weight, to->ldw, to->across, k, to->share), *to, rows, t, threads) && fine;
#ifdef LORAFIT_TILES
        tiles::release();
#endif
    }
    return fine ? 0 : 1;
}

KERNEL int multiplies_codes() {
#ifdef LORAFIT_AMX
    return tiles::permitted() ? 1 : 0;
#else
    return 1;
#endif
}
#else
KERNEL int multiplies_codes() { return 0; }
#endif
