// Frozen products that share an input, each with low-rank additions, forward and backward: each direction in one call, since
// a step makes hundreds of them and everything between two calls runs on one core.
//
// The rows may lie in runs, each with additions of its own. The frozen products know nothing of that: a weight is read and
// packed once for all rows. An addition is a part of the sum that belongs to the rows of its run alone.
#include "products.h"

#ifdef LORAFIT_TILES
extern "C" {

// y = x·W' + bias, with W' = Wᵀ for W (out, in) if `across`, else W (in, out). With `scale` (out,) the weight's numbers are codes of 8
// bits times scale/127, and what it is multiplied with is rounded to codes too.
struct Base {
    const void* weight;
    int64_t ldw;
    int64_t across;
    int64_t out;
    const bf16* bias;
    const float* scale;
    bf16* y;  // (rows, out): the product, or in the backward its gradient, null if there is none
    int64_t ldy;
};

// scale (x·Aᵀ)·Bᵀ for the rows of a run; r = 0 for nothing.
struct Low {
    const float* a;  // (r, in)
    const float* b;  // (out, r)
    int64_t r;
    float* da;  // as a
    float* db;  // as b
    double scale;
};

// x (rows, in) and what the backward needs besides: xa, for each run its x·Aᵀ side by side (its rows, its width).
struct Group {
    const Base* bases;
    int64_t count;
    const Low* lows;      // (runs, count)
    const int64_t* rows;  // of each run
    int64_t runs;
    const bf16* x;
    int64_t ldx, in;
    bf16* xa;
};
}

namespace {

inline int64_t whole(int64_t n) { return (n + DEEP - 1) / DEEP * DEEP; }

// Where an addition's columns of its run's xa begin, and its B in `thin`.
struct Place {
    int64_t start, b;
};

// A run: its rows, the sum of its additions' r, the columns of its xa (each addition has whole steps from its start on), and
// where its xa and its A's begin.
struct Run {
    int64_t first, last, ranks, width, xa, thin;
    const Low* lows;
    const Place* at;
    // In the backward: which threads have a part of its rows, and where their sums are, `each` numbers for one of them.
    int64_t from, to, sums, each;
};

struct Layout {
    Run* runs = nullptr;
    bf16* thin = nullptr;  // for what `pack` makes
    int64_t count = 0, rows = 0, numbers = 0;  // of rows, and of xa
    bool lows = false;
};

// False where memory ran out. Scratch is kept between calls: given back, every page of it would be cleared and mapped anew at
// each of hundreds of calls a step. What Python allocates for xa is measured alike, see lowrank.py.
bool lay(const Group& g, Layout& found) {
    static thread_local Buffer<Run> runs_;
    static thread_local Buffer<Place> places_;
    static thread_local Buffer<bf16> thin_;
    Run* runs = runs_.of(g.runs + 1);
    Place* places = places_.of(g.runs * g.count + 1);
    if (!runs || !places) return false;
    int64_t row = 0, xa = 0, thin = 0;
    for (int64_t n = 0; n < g.runs; n++) {
        Run& run = runs[n] = {row, row + g.rows[n], 0, 0, xa, thin, g.lows + n * g.count, places + n * g.count};
        for (int64_t i = 0; i < g.count; i++) {
            places[n * g.count + i].start = run.ranks;
            if (run.lows[i].r) run.width = std::max(run.width, run.ranks + whole(run.lows[i].r));
            run.ranks += run.lows[i].r;
        }
        run.width = whole(run.width);
        thin += run.width * g.in;
        for (int64_t i = 0; i < g.count; i++) {
            places[n * g.count + i].b = thin;
            thin += g.bases[i].out * whole(run.lows[i].r);
        }
        found.lows |= run.ranks > 0;
        row = run.last;
        xa += (run.last - run.first) * run.width;
    }
    found.runs = runs, found.count = g.runs, found.rows = row, found.numbers = xa;
    found.thin = thin_.of(thin + 1);
    return found.thin;
}

// This thread's, kept between calls of either direction.
codes::Roundings& kept() {
    static thread_local codes::Roundings roundings;
    return roundings;
}

inline CodesPart coded_part(const codes::Rounded& x, const Base& base, bool across, int64_t k) {
    return x.part(static_cast<const int8_t*>(base.weight), base.ldw, across, k, base.scale);
}

inline Part dense(const bf16* a, int64_t lda, const Base& base, int64_t k, int64_t across) {
    return {a, lda, static_cast<const bf16*>(base.weight), base.ldw, k, across};
}

// Thread t's share of a run's A's, one under another, and of each scale·B (out, whole steps); in bf16, zeros after them.
void pack(const Group& g, const Run& run, bf16* thin, int t, int threads) {
    bf16* as = thin + run.thin;
    for (int64_t i = 0; i < g.count; i++) {
        const Low& low = run.lows[i];
        for (int64_t row = low.r * t / threads; row < low.r * (t + 1) / threads; row++) {
            bf16* to = as + (run.at[i].start + row) * g.in;
            for (int64_t k = 0; k < g.in; k += 16) narrow(widen(low.a + row * g.in + k), to + k);
        }
        int64_t wide = whole(low.r), out = g.bases[i].out;
        float scale = low.scale;
        for (int64_t row = out * t / threads; wide && row < out * (t + 1) / threads; row++) {
            bf16* to = thin + run.at[i].b + row * wide;
            const float* from = low.b + row * low.r;
            int64_t k = 0;
            for (; k + 16 <= low.r; k += 16) narrow(widen(from + k) * scale, to + k);
            if (k < low.r) narrow(widen_some(from + k, low.r - k) * scale, to + k), k += 16;
            for (; k < wide; k += 16) narrow(Floats{}, to + k);
        }
    }
    if (t == 0) std::memset(as + run.ranks * g.in, 0, (run.width - run.ranks) * g.in * sizeof(bf16));
}

// The row that thread t's share begins with: rows weigh by the ranks that they meet. Whole steps of a run's rows.
int64_t begin(const Layout& layout, int64_t t, int64_t threads) {
    int64_t all = 0, before = 0;
    for (int64_t n = 0; n < layout.count; n++)
        all += (layout.runs[n].last - layout.runs[n].first) * layout.runs[n].ranks;
    int64_t aim = all * t / threads;
    for (int64_t n = 0; t < threads && n < layout.count; n++) {
        const Run& run = layout.runs[n];
        int64_t own = (run.last - run.first) * run.ranks;
        if (before + own > aim) return run.first + (aim - before) / run.ranks / TALL * TALL;
        before += own;
    }
    return layout.rows;
}

// Thread t's rows, run by run: job(run, first, last) for each that has additions.
template <typename Job>
void each_run(const Layout& layout, int64_t t, int64_t threads, Job job) {
    int64_t from = begin(layout, t, threads), to = begin(layout, t + 1, threads);
    for (int64_t n = 0; n < layout.count; n++) {
        Run& run = layout.runs[n];
        if (run.ranks) job(run, std::max(run.first, from), std::min(run.last, to));
    }
}

}  // namespace

// Both return 0, or 1 where scratch memory ran out.
KERNEL int low_rank_forward_bf16(const Group* group, int threads) {
    const Group& g = *group;
    Layout layout;
    if (!lay(g, layout)) return 1;
    codes::Roundings& roundings = kept();
    bool fine = true, coded = false;
    for (int64_t i = 0; i < g.count; i++) coded |= g.bases[i].scale != nullptr;
    if (coded && !roundings.of(layout.rows, g.in)) return 1;
    const codes::Rounded x = roundings.place(layout.rows, 0);
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        static thread_local Buffer<Part> parts_;
        tiles::configure();
        if (coded) {
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++) fine = x.round(g.x, g.ldx, layout.rows, g.in, nullptr, t, threads) && fine;
        }
        if (layout.lows) {
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++)
                for (int64_t n = 0; n < layout.count; n++) pack(g, layout.runs[n], layout.thin, t, threads);
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++)
                each_run(layout, t, threads, [&](const Run& run, int64_t first, int64_t last) {
                    if (first >= last) return;
                    Part part{g.x + run.first * g.ldx, g.ldx, layout.thin + run.thin, g.in, g.in, 1};
                    fine = block({&part, 1, run.last - run.first, run.width, g.xa + run.xa, run.width, nullptr},
                                 first - run.first, last - run.first, 0, run.width) && fine;
                });
        }
        Part* parts = parts_.of(layout.count + 1);
        fine = fine && parts;
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++)
            for (int64_t i = 0; parts && i < g.count; i++) {
                const Base& base = g.bases[i];
                int64_t used = 0;
                CodesPart codes = coded_part(x, base, true, g.in);
                if (!base.scale) parts[used++] = dense(g.x, g.ldx, base, g.in, base.across);
                for (int64_t n = 0; n < layout.count; n++) {
                    const Run& run = layout.runs[n];
                    int64_t wide = whole(run.lows[i].r);
                    if (wide && run.first < run.last)
                        parts[used++] = {g.xa + run.xa + run.at[i].start, run.width, layout.thin + run.at[i].b, wide, wide, 1,
                                         run.first, run.last};
                }
                Job job{parts, used, layout.rows, base.out, base.y, base.ldy, base.bias, &codes, base.scale ? 1 : 0};
                fine = share(job, t, threads) && fine;
            }
        tiles::release();
    }
    return fine ? 0 : 1;
}

// dx (rows, in), if it is wanted, and each da and db of an addition whose product has a gradient.
KERNEL int low_rank_backward_bf16(const Group* group, bf16* dx, int threads) {
    const Group& g = *group;
    Layout layout;
    if (!lay(g, layout)) return 1;
    int64_t most = 1, numbers = 0, used = 0;
    for (int64_t n = 0; n < layout.count; n++) {
        Run& run = layout.runs[n];
        most = std::max(most, run.ranks);
        run.each = cells(run.ranks, g.in);
        for (int64_t i = 0; i < g.count; i++) run.each += cells(run.lows[i].r, g.bases[i].out);
        run.each *= CELL;
        run.from = threads, run.to = 0;
    }
    for (int64_t t = 0; t < threads; t++)
        each_run(layout, t, threads, [&](Run& run, int64_t first, int64_t last) {
            if (first < last) run.from = std::min(run.from, t), run.to = t + 1;
        });
    for (int64_t n = 0; n < layout.count; n++) {
        Run& run = layout.runs[n];
        run.sums = numbers;
        numbers += run.each * std::max<int64_t>(0, run.to - run.from);
    }
    // d(x·Aᵀ), a turned chunk of each thread, and its sums.
    int64_t flat_each = bands_of(most) * STEPS * TILE;
    static thread_local Buffer<bf16> dxas, flats;
    static thread_local Buffer<float> all_sums;
    static thread_local Buffer<Part> all_parts;
    bf16 *dxa = dxas.of(layout.numbers + 1), *flats_ = flats.of(threads * flat_each + 1);
    float* sums_ = all_sums.of(numbers + 1);
    Part* parts = all_parts.of(g.count + layout.count + 1);
    if (!dxa || !flats_ || !sums_ || !parts) return 1;
    static thread_local Buffer<CodesPart> all_codes;
    codes::Roundings& roundings = kept();  // this thread's, in the others too
    int64_t coded = 0, wide = 0;
    for (int64_t i = 0; i < g.count; i++)
        if (const Base& base = g.bases[i]; dx && base.y && base.scale) coded++, wide += base.out;
    CodesPart* codes = all_codes.of(coded + 1);
    if (!codes || (coded && !roundings.of(layout.rows, wide))) return 1;
    coded = wide = 0;
    for (int64_t i = 0; dx && i < g.count; i++) {
        const Base& base = g.bases[i];
        if (base.y && base.scale) {
            codes[coded] = coded_part(roundings.place(layout.rows, wide), base, false, base.out);
            coded++, wide += base.out;
        } else if (base.y) {
            parts[used++] = dense(base.y, base.ldy, base, base.out, !base.across);
        }
    }
    // Thread t's share of what arrives, each number with its column's scale.
    auto round = [&](int t) {
        bool fine = true;
        for (int64_t i = 0, before = 0; coded && i < g.count; i++)
            if (const Base& base = g.bases[i]; base.y && base.scale) {
                codes::Rounded place = roundings.place(layout.rows, before);
                fine = place.round(base.y, base.ldy, layout.rows, base.out, base.scale, t, threads) && fine;
                before += base.out;
            }
        return fine;
    };
    for (int64_t n = 0; n < layout.count; n++)
        if (const Run& run = layout.runs[n]; run.ranks && run.first < run.last)
            parts[used++] = {dxa + run.xa, run.width, layout.thin + run.thin, g.in, run.width, 0, run.first, run.last};
    // Rows first..last of a run: d(x·Aᵀ), and what they add to the gradients.
    auto rows = [&](const Run& run, int64_t first, int64_t last, bf16* flat, float* sums) {
        bool fine = true;
        for (int64_t row = first; row < last; row += CHUNK) {
            int64_t many = std::min(CHUNK, last - row), own = row - run.first;
            bf16* made = dxa + run.xa + own * run.width;
            std::memset(made, 0, many * run.width * sizeof(bf16));
            float* to = sums + cells(run.ranks, g.in) * CELL;
            for (int64_t i = 0; i < g.count; i++) {
                const Base& base = g.bases[i];
                const Low& low = run.lows[i];
                if (base.y && low.r) {
                    Part part{base.y + row * base.ldy, base.ldy, layout.thin + run.at[i].b, whole(low.r), base.out, 0};
                    fine = block({&part, 1, many, low.r, made + run.at[i].start, run.width, nullptr}, 0, many, 0, low.r) && fine;
                    turn(g.xa + run.xa + own * run.width + run.at[i].start, run.width, many, low.r, flat);
                    outer(flat, low.r, base.y + row * base.ldy, base.ldy, many, base.out, to, row == first);
                }
                to += cells(low.r, base.out) * CELL;
            }
            turn(made, run.width, many, run.ranks, flat);
            outer(flat, run.ranks, g.x + row * g.ldx, g.ldx, many, g.in, sums, row == first);
        }
        return fine;
    };
    // Thread t's share of a run's gradients.
    auto gather = [&](const Run& run, int t) {
        const float *sums = sums_ + run.sums, *from = sums + cells(run.ranks, g.in) * CELL;
        int64_t many = run.to - run.from;
        for (int64_t i = 0; i < g.count; i++) {
            const Low& low = run.lows[i];
            int64_t out = g.bases[i].out;
            float scale = low.scale;
            if (g.bases[i].y && low.r) {
                collect(sums, run.each, many, run.ranks, g.in, run.at[i].start, low.r, t, threads,
                        [&](int64_t row, int64_t rows, int64_t j, int64_t columns, const float* block) {
                            for (int64_t k = 0; k < rows; k++)
                                std::memcpy(low.da + (row + k) * g.in + j, block + k * WIDE, columns * sizeof(float));
                        });
                collect(from, run.each, many, low.r, out, 0, low.r, t, threads,
                        [&](int64_t row, int64_t rows, int64_t j, int64_t columns, const float* block) {
                            alignas(64) float turned[16 * WIDE];
                            for (int64_t half = 0; half < WIDE; half += 16)
                                transpose(block + half, WIDE * sizeof(float), turned + half * 16, 16 * sizeof(float));
                            for (int64_t k = 0; k < columns; k++) {
                                Floats some = widen(turned + k * 16) * scale;
                                float* to = low.db + (j + k) * low.r + row;
                                rows == 16 ? narrow(some, to) : narrow_some(some, to, rows);
                            }
                        });
            }
            from += cells(low.r, out) * CELL;
        }
    };
    bool fine = true;
#pragma omp parallel num_threads(threads) reduction(&& : fine)
    {
        tiles::configure();
        if (coded) {
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++) fine = round(t) && fine;
        }
        if (layout.lows) {  // packed anew: kept from the forward they would be a copy of the adapter
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++)
                for (int64_t n = 0; n < layout.count; n++) pack(g, layout.runs[n], layout.thin, t, threads);
#pragma omp for schedule(static)
            for (int t = 0; t < threads; t++)
                each_run(layout, t, threads, [&](const Run& run, int64_t first, int64_t last) {
                    if (t < run.from || t >= run.to) return;
                    float* sums = sums_ + run.sums + (t - run.from) * run.each;
                    if (first < last)
                        fine = rows(run, first, last, flats_ + t * flat_each, sums) && fine;
                    else
                        std::memset(sums, 0, run.each * sizeof(float));  // between threads that have some
                });
        }
#pragma omp for schedule(static)
        for (int t = 0; t < threads; t++) {
            if (dx) fine = share({parts, used, layout.rows, g.in, dx, g.in, nullptr, codes, coded}, t, threads) && fine;
            for (int64_t n = 0; n < layout.count; n++)
                if (const Run& run = layout.runs[n]; run.from < run.to) gather(run, t);
        }
        tiles::release();
    }
    return fine ? 0 : 1;
}
#endif
