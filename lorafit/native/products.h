// Sums of bf16 matrix products on tiles (AMX, or vectors in their stead): C = sum over parts of A·B, accumulated in fp32 and rounded once.
//
// A frozen product and its low-rank addition are two parts of one sum, and so are the gradients that several products
// send to their common input; written like this neither needs a pass over C of its own. Frozen weights are packed into
// AMX's layout on the way, a slice at a time (a few per cent of the product), so no second copy of them is kept.
//
// Everything here is the work of one thread, whose tiles are configured; kernels share it out.
#pragma once
#include "codes.h"

#ifdef LORAFIT_TILES
#include <algorithm>
#include <limits>

// One part: a (rows, k) with stride lda; b (columns, k) if `across` (A·Bᵀ), else (k, columns), with stride ldb. k is a
// multiple of 32. It belongs to the rows first..last of C alone, and a begins with the first of them.
struct Part {
    const bf16* a;
    int64_t lda;
    const bf16* b;
    int64_t ldb;
    int64_t k;
    int64_t across;
    int64_t first = 0, last = std::numeric_limits<int64_t>::max();
};

namespace {

constexpr int64_t DEEP = 32, WIDE = 32, TALL = 32;  // of a step of four tile products
constexpr int64_t TILE = 512;                       // numbers in a tile: 16 rows of 32
constexpr int64_t DEPTH = 4096;                    // of a slice at most: sums that wait for the next one cost more than they save
constexpr int64_t SLICE = 512 * 1024;              // numbers in a slice of B: half of an L2 cache

inline __m512i row_of(const bf16* p, int64_t numbers) {  // up to 32 numbers, zeros after them
    if (numbers >= 32) return _mm512_loadu_si512(p);
    __mmask32 some = numbers <= 0 ? 0 : (1u << numbers) - 1;
    return _mm512_maskz_loadu_epi16(some, p);
}

// A tile from 16 rows of b (columns, k): pairs along k are whole 32-bit words, so this is a 16 x 16 transposition.
inline void pack_across(const bf16* b, int64_t ldb, int64_t columns, bf16* tile) {
    if (columns >= 16) return transpose(b, ldb * 2, tile, 64);
    alignas(64) bf16 padded[TILE] = {};
    for (int64_t i = 0; i < columns; i++) std::memcpy(padded + i * DEEP, b + i * ldb, 64);
    transpose(padded, 64, tile, 64);
}

// Two tiles from up to 32 rows of b (k, columns), 32 columns wide: pairs of rows are interleaved. `quick` leaves the columns
// in the order that is cheapest: of each eight, the first four go to the left tile, the last four to the right one.
inline void pack_along(const bf16* b, int64_t ldb, int64_t rows, int64_t columns, bf16* to, bool quick = false) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                          53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
    for (int64_t p = 0; p < 16; p++) {
        __m512i even = 2 * p < rows ? row_of(b + 2 * p * ldb, columns) : _mm512_setzero_si512();
        __m512i odd = 2 * p + 1 < rows ? row_of(b + (2 * p + 1) * ldb, columns) : _mm512_setzero_si512();
        __m512i left = quick ? _mm512_unpacklo_epi16(even, odd) : _mm512_permutex2var_epi16(even, low, odd);
        __m512i right = quick ? _mm512_unpackhi_epi16(even, odd) : _mm512_permutex2var_epi16(even, high, odd);
        _mm512_store_si512(to + 32 * p, left);
        _mm512_store_si512(to + TILE + 32 * p, right);
    }
}

struct Step {  // 32 deep: whose it is and how deep in it, and where B's numbers are
    const Part* part;
    int64_t k;
    const bf16* b;
};

struct Turn {  // a step that 32 rows take: where A's numbers are, and which step of the slice it is
    const bf16* a;
    int64_t lda;
    int64_t step;
};

#ifdef LORAFIT_AMX
// The loads come first: mixed with the products they take longer. A slice of B is passed over for every 32 rows and doesn't
// fit the first cache, so it is marked as not worth keeping there.
inline void products(const bf16* a, int64_t lda, const bf16* b, bool ahead) {
    if (ahead)
        for (int i = 0; i < TALL; i++) _mm_prefetch(reinterpret_cast<const char*>(a + i * lda + DEEP), _MM_HINT_T0);
    tiles::load<4>(a, lda * 2);
    tiles::load<5>(a + 16 * lda, lda * 2);
    tiles::stream<6>(b, 64);
    tiles::stream<7>(b + TILE, 64);
    tiles::multiply<0, 1, 4>();
    tiles::multiply<2, 3, 5>();
}

#else
// All turns of a block: what the loop over `products` does with tiles.
inline void products_of(const Turn* turns, int64_t count, const bf16* packed, bool begin, float* sums) {
    for (int row = 0; row < TALL; row += tiles::ROWS) {
        float* c = sums + row * WIDE;
        tiles::Sums c_sums;
        if (begin)
            c_sums.begin();
        else
            c_sums.load(c, c + 16, WIDE);
        for (const Turn* at = turns; at < turns + count; at++) {
            const bf16* b = packed + at->step * 2 * TILE;
            c_sums.add(at->a + row * at->lda, at->lda, b, b + TILE);
        }
        c_sums.store(c, c + 16, WIDE);
    }
}
#endif

struct Job {
    const Part* parts;
    int64_t count, rows, columns;
    bf16* c;
    int64_t ldc;
    const bf16* bias;  // of each column, or null
    const CodesPart* coded = nullptr;  // parts in 8 bits, of all rows; they come first
    int64_t coded_count = 0;
};

// A block of up to 32 x 32 sums on its way into C. It is rounded row by row between the tile products of the next block: the
// units that do it are idle then, and the sums have left the store buffer.
struct Rest {
    const float* sums = nullptr;
    bf16* to = nullptr;
    int64_t ldc = 0, rows = 0;
    __mmask32 some = 0;
    __m512 shift[2] = {};

    Rest() = default;
    Rest(const Job& job, const float* sums, int64_t m, int64_t n, int64_t tall, int64_t wide)
        : sums(sums), to(job.c + m * job.ldc + n), ldc(job.ldc), rows(tall), some(wide >= 32 ? ~0u : (1u << wide) - 1) {
        if (!job.bias) return;
        alignas(64) bf16 bias[32] = {};
        std::memcpy(bias, job.bias + n, wide * sizeof(bf16));
        shift[0] = (__m512)widen(bias), shift[1] = (__m512)widen(bias + 16);
    }
    INLINE void round(int64_t count) {
        for (; count > 0 && rows > 0; count--, rows--, sums += WIDE, to += ldc) {
            __m512 x = _mm512_add_ps(_mm512_loadu_ps(sums), shift[0]);
            __m512 y = _mm512_add_ps(_mm512_loadu_ps(sums + 16), shift[1]);
            _mm512_mask_storeu_epi16(to, some, (__m512i)_mm512_cvtne2ps_pbh(y, x));
        }
    }
};

// The steps `from`..`to` that the rows m..m+tall take. Where the rows aren't 32, or not all of them the part's, they are copied
// to `copies` with zeros for the others, so that every tile is whole and a part reaches no row but its own.
inline int64_t turns_of(const Step* steps, int64_t from, int64_t to, int64_t m, int64_t tall, Turn* turns, bf16* copies) {
    int64_t count = 0;
    for (int64_t s = from; s < to; s++) {
        const Part& part = *steps[s].part;
        int64_t low = std::max(m, part.first), high = std::min(m + tall, part.last);
        if (low >= high) continue;
        const bf16* a = part.a + (low - part.first) * part.lda + steps[s].k;
        if (high - low == TALL) {
            turns[count++] = {a, part.lda, s - from};
            continue;
        }
        bf16* copy = copies + count * TALL * DEEP;
        for (int64_t i = 0; i < TALL; i++) {
            bool own = i >= low - m && i < high - m;
            _mm512_store_si512(copy + i * DEEP, own ? _mm512_loadu_si512(a + (i - low + m) * part.lda) : _mm512_setzero_si512());
        }
        turns[count++] = {copy, DEEP, s - from};
    }
    return count;
}

// Rows m0..m1 and columns n0..n1 of C, by one thread.
bool block(const Job& job, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
    static thread_local Buffer<bf16> packed_, copies_;
    static thread_local Buffer<uint8_t> coded_;
    static thread_local Buffer<float> sums_;
    static thread_local Buffer<Step> steps_;
    static thread_local Buffer<Turn> turns_;
    int64_t depth = 0;
    for (int64_t p = 0; p < job.count; p++) depth += job.parts[p].k / DEEP;
    Step* steps = steps_.of(depth + 1);
    if (!steps) return false;
    depth = 0;
    for (int64_t p = 0; p < job.count; p++) {
        const Part& part = job.parts[p];
        if (part.first >= m1 || part.last <= m0) continue;
        for (int64_t k = 0; k < part.k; k += DEEP)
            steps[depth++] = {&part, k, part.across ? part.b + k : part.b + k * part.ldb};
    }
    int64_t slices = std::max<int64_t>(1, (depth + DEPTH / DEEP - 1) / (DEPTH / DEEP)), deep = (depth + slices - 1) / slices;
    int64_t codes_deep = 0;
    for (int64_t p = 0; p < job.coded_count; p++) codes_deep += job.coded[p].k;
    // As few slices as the size allows, all alike.
    int64_t most = std::max<int64_t>(1, SLICE / ((deep * DEEP + codes_deep / 2) * WIDE + 1)), panels_all = (n1 - n0 + WIDE - 1) / WIDE;
    int64_t rounds = (panels_all + most - 1) / most, panels_each = (panels_all + rounds - 1) / rounds;
    bf16* packed = packed_.of(panels_each * deep * DEEP * WIDE + 1);
    float* sums = sums_.of(slices > 1 ? (m1 - m0 + TALL) * panels_each * WIDE : 2 * TALL * WIDE);
    bf16* copies = copies_.of(deep * DEEP * TALL + 1);
    Turn* turns = turns_.of(deep + 1);
    uint8_t* coded = coded_.of(panels_each * codes_deep * WIDE + 1);
    if (!packed || !sums || !copies || !turns || !coded) return false;
    Rest rest;
    int64_t turn = 0;
    for (int64_t n = n0; n < n1; n += panels_each * WIDE) {
        int64_t panels = (std::min(n1, n + panels_each * WIDE) - n + WIDE - 1) / WIDE;
        for (int64_t panel = 0; panel < panels; panel++) {
            uint8_t* to = coded + panel * codes_deep * WIDE;
            for (const CodesPart* part = job.coded; part < job.coded + job.coded_count; to += part->k * WIDE, part++)
                codes::pack_panel(*part, n + panel * WIDE, to);
        }
        for (int64_t slice = 0; slice < slices; slice++) {
            int64_t first = slice * deep, last = std::min(depth, first + deep);
            // Either kind is walked as it lies in memory: along k where a row is a column of B, across panels where it isn't.
            auto place = [&](int64_t panel, int64_t s) { return packed + (panel * deep + s - first) * 2 * TILE; };
            for (int64_t panel = 0; panel < panels; panel++)
                for (int64_t s = first; s < last; s++)
                    if (const Part& part = *steps[s].part; part.across) {
                        int64_t column = n + panel * WIDE, wide = std::min(WIDE, job.columns - column);
                        pack_across(steps[s].b + column * part.ldb, part.ldb, wide, place(panel, s));
                        pack_across(steps[s].b + (column + 16) * part.ldb, part.ldb, wide - 16, place(panel, s) + TILE);
                    }
            for (int64_t s = first; s < last; s++)
                if (const Part& part = *steps[s].part; !part.across)
                    for (int64_t panel = 0; panel < panels; panel++) {
                        int64_t column = n + panel * WIDE, wide = std::min(WIDE, job.columns - column);
                        pack_along(steps[s].b + column, part.ldb, DEEP, wide, place(panel, s));
                    }
            for (int64_t m = m0; m < m1; m += TALL) {
                int64_t tall = std::min(TALL, m1 - m);
                int64_t count = turns_of(steps, first, last, m, tall, turns, copies);
                for (int64_t panel = 0; panel < panels; panel++) {
                    float* to = slices > 1 ? sums + (m - m0) * panels * WIDE + panel * TALL * WIDE : sums + (turn ^= TALL * WIDE);
                    const bf16* b = packed + panel * deep * 2 * TILE;
                    bool more = slice || job.coded_count;  // there are sums already
                    if (!slice && job.coded_count) {
                        const uint8_t* from = coded + panel * codes_deep * WIDE;
                        int64_t column = n + panel * WIDE;
                        for (int64_t p = 0; p < job.coded_count; from += job.coded[p++].k * WIDE)
                            codes::add(job.coded[p], from, m, tall, column, p == 0, to);
                    }
#ifdef LORAFIT_AMX
                    if (more) {
                        tiles::load<0>(to, WIDE * 4), tiles::load<1>(to + 16, WIDE * 4);
                        tiles::load<2>(to + 16 * WIDE, WIDE * 4), tiles::load<3>(to + 16 * WIDE + 16, WIDE * 4);
                    } else {
                        tiles::zero<0>(), tiles::zero<1>(), tiles::zero<2>(), tiles::zero<3>();
                    }
                    int64_t each = count ? (rest.rows + count - 1) / count : 0;
                    for (const Turn* at = turns; at < turns + count; at++) {
                        products(at->a, at->lda, b + at->step * 2 * TILE, panel == 0);
                        rest.round(each);
                    }
                    rest.round(TALL);  // where there was nothing to do it beside
                    tiles::store<0>(to, WIDE * 4), tiles::store<1>(to + 16, WIDE * 4);
                    tiles::store<2>(to + 16 * WIDE, WIDE * 4), tiles::store<3>(to + 16 * WIDE + 16, WIDE * 4);
#else
                    rest.round(TALL);
                    if (count || !more) products_of(turns, count, b, !more, to);
#endif
                    if (slice == slices - 1) {
                        int64_t column = n + panel * WIDE;
                        rest = Rest(job, to, m, column, tall, std::min(WIDE, job.columns - column));
                    }
                }
            }
            rest.round(TALL);  // its sums may be written again
        }
    }
    return true;
}

// Thread t's share of a job. False where memory ran out.
bool share(const Job& job, int t, int threads) {
    return shared(job.rows, job.columns, t, threads,
                  [&](int64_t m0, int64_t m1, int64_t n0, int64_t n1) { return block(job, m0, m1, n0, n1); });
}

// Gradients of thin matrices, Pᵀ·Q for P (rows, left) and Q (rows, right): a chunk of rows at a time, because what the chunk
// is made of is at hand then. Sums are fp32, by panels of 32 columns of Q and bands of 16 columns of P, 16 x 32 each.
constexpr int64_t STEPS = 8, CHUNK = STEPS * DEEP, CELL = 16 * WIDE;

inline int64_t bands_of(int64_t left) { return (left + 15) / 16; }
inline int64_t cells(int64_t left, int64_t right) { return bands_of(left) * ((right + WIDE - 1) / WIDE); }

// P of a chunk in tiles, transposed: for each band STEPS tiles of 32 rows, zeros beyond `rows`.
inline void turn(const bf16* p, int64_t ldp, int64_t rows, int64_t left, bf16* flat) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                           4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t row = 0; row < rows; row += DEEP)
        for (int64_t band = 0; band < bands_of(left); band++) {
            __mmask16 some = left - band * 16 >= 16 ? 0xffff : (1u << (left - band * 16)) - 1;
            alignas(64) bf16 words[TILE];  // a pair of rows in every line
            for (int64_t k = 0; k < DEEP; k += 2) {
                const bf16* from = p + (row + k) * ldp + band * 16;
                __m256i even = _mm256_maskz_loadu_epi16(row + k < rows ? some : 0, from);
                __m256i odd = _mm256_maskz_loadu_epi16(row + k + 1 < rows ? some : 0, from + ldp);
                __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
                _mm512_store_si512(words + k * 16, _mm512_permutexvar_epi16(pairs, both));
            }
            transpose(words, 64, flat + (band * STEPS + row / DEEP) * TILE, 64);
        }
}

// pack_along, quick, of 32 whole rows and columns. The lines to the right come next; a row lies pages from the last one, so
// the processor wouldn't fetch them by itself.
inline void pack_quickly(const bf16* q, int64_t ldq, bf16* to) {
    for (int64_t p = 0; p < 16; p++) {
        _mm_prefetch(reinterpret_cast<const char*>(q + 2 * p * ldq + WIDE), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(q + (2 * p + 1) * ldq + WIDE), _MM_HINT_T0);
        __m512i even = _mm512_loadu_si512(q + 2 * p * ldq), odd = _mm512_loadu_si512(q + (2 * p + 1) * ldq);
        _mm512_store_si512(to + 32 * p, _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + TILE + 32 * p, _mm512_unpackhi_epi16(even, odd));
    }
}

// Adds Pᵀ·Q of a chunk to `sums`, or begins them. `flat` is the turned P.
inline void outer(const bf16* flat, int64_t left, const bf16* q, int64_t ldq, int64_t rows, int64_t right, float* sums, bool begin) {
    alignas(64) bf16 strip[STEPS * 2 * TILE];
    int64_t steps = (rows + DEEP - 1) / DEEP;
    for (int64_t column = 0; column < right; column += WIDE) {
        for (int64_t s = 0; s < steps; s++) {
            const bf16* at = q + s * DEEP * ldq + column;
            if (column + WIDE <= right && (s + 1) * DEEP <= rows)
                pack_quickly(at, ldq, strip + s * 2 * TILE);
            else
                pack_along(at, ldq, rows - s * DEEP, right - column, strip + s * 2 * TILE, true);
        }
        for (int64_t band = 0; band < bands_of(left); band++, sums += CELL) {
            const bf16* at = flat + band * STEPS * TILE;
            if (begin)
                tiles::sum<1, false>(at, 0, TILE, strip, strip + TILE, 2 * TILE, steps, sums, sums + 16, WIDE);
            else
                tiles::sum<1, true>(at, 0, TILE, strip, strip + TILE, 2 * TILE, steps, sums, sums + 16, WIDE);
        }
    }
}

// Thread t's share of `count` columns of P from `first` on, of the cells that `many` threads have summed up, `apart` numbers
// from each other's: `put(i, rows, j, columns, block)` for up to 16 of these columns of P from the i-th and 32 of Q from j on, as
// the rows and columns of a block.
template <typename Put>
void collect(const float* sums, int64_t apart, int64_t many, int64_t left, int64_t right, int64_t first, int64_t count, int t,
             int threads, Put put) {
    // Undoes pack_quickly's order.
    const __m512i begin = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i end = _mm512_add_epi32(begin, _mm512_set1_epi32(8));
    alignas(64) float block[16 * WIDE];
    int64_t bands = bands_of(left), panels = (right + WIDE - 1) / WIDE;
    for (int64_t panel = panels * t / threads; panel < panels * (t + 1) / threads; panel++)
        for (int64_t from = 0; from < count; from += 16) {
            int64_t rows = std::min<int64_t>(16, count - from);
            for (int64_t i = 0; i < rows; i++) {
                int64_t column = first + from + i;
                const float* row = sums + (panel * bands + column / 16) * CELL + column % 16 * WIDE;
                Floats low = widen(row), high = widen(row + 16);
                for (int64_t n = 1; n < many; n++) low += widen(row + n * apart), high += widen(row + n * apart + 16);
                narrow((Floats)_mm512_permutex2var_ps((__m512)low, begin, (__m512)high), block + i * WIDE);
                narrow((Floats)_mm512_permutex2var_ps((__m512)low, end, (__m512)high), block + i * WIDE + 16);
            }
            put(from, rows, panel * WIDE, std::min(WIDE, right - panel * WIDE), block);
        }
}
}  // namespace
#endif
