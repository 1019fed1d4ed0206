// Frozen products that share an input, each with a low-rank addition, forward and backward: each direction in one call, since
// a step makes hundreds of them and everything between two calls runs on one core.
#include "products.h"

#ifdef LORAFIT_AMX
extern "C" {

// y = x·W' + bias + scale (x·Aᵀ)·Bᵀ, with W' = Wᵀ for W (out, in) if `across`, else W (in, out). Without an addition r = 0.
struct Low {
    const bf16* weight;
    int64_t ldw;
    int64_t across;
    int64_t out;
    const bf16* bias;
    const float* a;  // (r, in)
    const float* b;  // (out, r)
    int64_t r;
    bf16* y;  // (rows, out): the product, or in the backward its gradient, null if there is none
    int64_t ldy;
    float* da;  // as a
    float* db;  // as b
    double scale;
};

// x (rows, in) and what the backward needs besides: xa (rows, width), the x·Aᵀ side by side. `thin` is for what `pack` makes.
struct Group {
    const Low* lows;
    int64_t count;
    const bf16* x;
    int64_t ldx, rows, in;
    bf16* xa;
    int64_t width;  // the sum of all r and at least each `span` after its `start`
    bf16* thin;  // scratch
};
}

namespace {

inline int64_t span(const Low& low) { return (low.r + DEEP - 1) / DEEP * DEEP; }

// In which column of xa each addition begins, and where its B is in `thin`, after all the A's.
struct Place {
    int64_t start, b;
};

inline Place* places(const Group& g, Buffer<Place>& buffer) {
    Place* found = buffer.of(g.count + 1);
    if (!found) return nullptr;
    Place at{0, g.width * g.in};
    for (int64_t i = 0; i < g.count; i++) {
        found[i] = at;
        at.start += g.lows[i].r;
        at.b += g.lows[i].out * span(g.lows[i]);
    }
    found[g.count] = at;
    return found;
}

// Thread t's share of the A's, one under another, and of each scale·B (out, span); in bf16, zeros after them.
void pack(const Group& g, const Place* at, int t, int threads) {
    for (int64_t i = 0; i < g.count; i++) {
        const Low& low = g.lows[i];
        for (int64_t row = low.r * t / threads; row < low.r * (t + 1) / threads; row++) {
            bf16* to = g.thin + (at[i].start + row) * g.in;
            for (int64_t k = 0; k < g.in; k += 16) narrow(widen(low.a + row * g.in + k), to + k);
        }
        int64_t wide = span(low);
        float scale = low.scale;
        for (int64_t row = low.out * t / threads; row < low.out * (t + 1) / threads; row++) {
            bf16* to = g.thin + at[i].b + row * wide;
            const float* from = low.b + row * low.r;
            int64_t k = 0;
            for (; k + 16 <= low.r; k += 16) narrow(widen(from + k) * scale, to + k);
            if (k < low.r) narrow(widen_some(from + k, low.r - k) * scale, to + k), k += 16;
            for (; k < wide; k += 16) narrow(Floats{}, to + k);
        }
    }
    if (t == 0)
        std::memset(g.thin + at[g.count].start * g.in, 0, (g.width - at[g.count].start) * g.in * sizeof(bf16));
}

}  // namespace

// Both return 0, or 1 where scratch memory ran out.
KERNEL int low_rank_forward_bf16(const Group* group, int threads) {
    const Group& g = *group;
    static thread_local Buffer<Place> places_;
    const Place* at = places(g, places_);
    if (!at) return 1;
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        tiles::configure();
        if (g.width) {
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++) pack(g, at, t, threads);
            Part part{g.x, g.ldx, g.thin, g.in, g.in, 1};
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++)
                fine = share({&part, 1, g.rows, g.width, g.xa, g.width, nullptr}, t, threads) && fine;
        }
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++)
            for (int64_t i = 0; i < g.count; i++) {
                const Low& low = g.lows[i];
                Part parts[] = {{g.x, g.ldx, low.weight, low.ldw, g.in, low.across},
                                {g.xa + at[i].start, g.width, g.thin + at[i].b, span(low), span(low), 1}};
                fine = share({parts, low.r ? 2 : 1, g.rows, low.out, low.y, low.ldy, low.bias}, t, threads) && fine;
            }
        tiles::release();
    }
    return fine ? 0 : 1;
}

// dx (rows, in), if it is wanted, and each da and db of an addition whose product has a gradient.
KERNEL int low_rank_backward_bf16(const Group* group, bf16* dx, int threads) {
    const Group& g = *group;
    static thread_local Buffer<Place> places_;
    const Place* at = places(g, places_);
    if (!at) return 1;
    int64_t ranks = at[g.count].start, most = ranks, sums_each = cells(ranks, g.in), used = 0;
    for (int64_t i = 0; i < g.count; i++) {
        most = std::max(most, g.lows[i].r);
        sums_each += cells(g.lows[i].r, g.lows[i].out);
    }
    sums_each *= CELL;
    // d(x·Aᵀ), a turned chunk of each thread, and its sums.
    int64_t bands = (g.rows + TALL - 1) / TALL, flat_each = bands_of(most) * STEPS * TILE;
    int64_t workers = std::min<int64_t>(threads, bands);
    Buffer<bf16> dxas, flats;
    Buffer<float> all_sums;
    Buffer<Part> all_parts;
    bf16 *dxa = dxas.of(g.rows * g.width + 1), *flat = flats.of(workers * flat_each + 1);
    float* sums = all_sums.of(workers * sums_each + 1);
    Part* parts = all_parts.of(g.count + 1);
    if (!dxa || !flat || !sums || !parts) return 1;
    for (int64_t i = 0; i < g.count; i++)
        if (const Low& low = g.lows[i]; low.y)
            parts[used++] = {low.y, low.ldy, low.weight, low.ldw, low.out, !low.across};
    if (g.width) parts[used++] = {dxa, g.width, g.thin, g.in, g.width, 0};
    // Rows first..last: d(x·Aᵀ), and what they add to the gradients.
    auto rows = [&](int64_t first, int64_t last, bf16* flat, float* sums) {
        bool fine = true;
        for (int64_t row = first; row < last; row += CHUNK) {
            int64_t many = std::min(CHUNK, last - row);
            bf16* made = dxa + row * g.width;
            std::memset(made, 0, many * g.width * sizeof(bf16));
            float* to = sums + cells(ranks, g.in) * CELL;
            for (int64_t i = 0; i < g.count; i++) {
                const Low& low = g.lows[i];
                if (low.y && low.r) {
                    Part part{low.y, low.ldy, g.thin + at[i].b, span(low), low.out, 0};
                    fine = block({&part, 1, g.rows, low.r, dxa + at[i].start, g.width, nullptr}, row, row + many, 0, low.r) && fine;
                    turn(g.xa + row * g.width + at[i].start, g.width, many, low.r, flat);
                    outer(flat, low.r, low.y + row * low.ldy, low.ldy, many, low.out, to, row == first);
                }
                to += cells(low.r, low.out) * CELL;
            }
            turn(made, g.width, many, ranks, flat);
            outer(flat, ranks, g.x + row * g.ldx, g.ldx, many, g.in, sums, row == first);
        }
        return fine;
    };
    // Thread t's share of the gradients.
    auto gather = [&](int t) {
        const float* from = sums + cells(ranks, g.in) * CELL;
        for (int64_t i = 0; i < g.count; i++) {
            const Low& low = g.lows[i];
            float scale = low.scale;
            if (low.y && low.r) {
                collect(sums, sums_each, workers, ranks, g.in, at[i].start, low.r, t, threads,
                        [&](int64_t row, int64_t j, float sum) { low.da[row * g.in + j] = sum; });
                collect(from, sums_each, workers, low.r, low.out, 0, low.r, t, threads,
                        [&](int64_t row, int64_t j, float sum) { low.db[j * low.r + row] = sum * scale; });
            }
            from += cells(low.r, low.out) * CELL;
        }
    };
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        tiles::configure();
        if (g.width) {  // packed anew: kept from the forward they would be a copy of the adapter
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++) pack(g, at, t, threads);
        }
        if (ranks)
#pragma omp for schedule(static)
            for (int t = 0; t < workers; t++) {
                int64_t first = bands * t / workers * TALL, last = std::min(g.rows, bands * (t + 1) / workers * TALL);
                fine = rows(first, last, flat + t * flat_each, sums + t * sums_each) && fine;
            }
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) {
            if (dx) fine = share({parts, used, g.rows, g.in, dx, g.in, nullptr}, t, threads) && fine;
            if (ranks) gather(t);
        }
        tiles::release();
    }
    return fine ? 0 : 1;
}
#endif
