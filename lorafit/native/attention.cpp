// Causal attention for packed rows, forward and backward: documents lie end to end and never see each other.
//
// The algorithm is FlashAttention-2 (arXiv 2307.08691): scores exist only as blocks in a thread's scratch, the softmax of a
// row is carried from block to block, and the backward makes the probabilities anew from one number a row. Blocks above the
// diagonal or outside the sliding window are never touched; 32 x 32 is the grain.
//
// Every operand of a product is packed into lines of 64 bytes, so that the tile unit, the vector units and plain loops run
// the same code below and differ in one `Engine`. With K the elements of a line (32 bf16 or 16 float):
//   left    [k / K][rows][K]                lines along the summed dimension
//   right   [columns / 16][k][16]           bf16: two consecutive k side by side in each of the 16 places
//   result  [columns / 16][rows][16]        float
// Rows, columns and k are padded with zeros, to 32 tokens and to K of a head's dimensions.
//
// The result doesn't depend on the number of threads: a unit of work owns what it writes. The one sum shared by units, a
// query's gradient over its document's chunks of keys, is added up in the order of the chunks.
#include "common.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <sched.h>
#endif

namespace {

constexpr int64_t SUB = 32;           // tokens: the grain of everything
constexpr int64_t QUERIES = 128;      // of a backward block; the longer, the fewer passes over the chunk's dK and dV
constexpr int64_t CHUNK = 256;        // keys whose dK and dV a unit of the backward owns; a multiple of QUERIES
constexpr int64_t KEYS = 256;         // of a forward block; the running softmax is corrected once a block
constexpr int64_t FORWARD_ROWS = 768; // about so many rows (queries x heads of a group) share one packing of the keys

constexpr float LOG2E = 1.44269504f;

// 2^x to 3e-7 relative: 2^n times a polynomial on [-1/2, 1/2]. At -127 and below it is 0 exactly; NaN stays NaN.
INLINE Floats exp2(Floats x) {
    const Floats least = all(-127.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = x < least ? least : x;
    Floats shifted = x + magic, f = x - (shifted - magic);
    Floats p = f * 1.3390867e-3f + 9.6663740e-3f;
    p = p * f + 5.5503570e-2f;
    p = p * f + 2.4022348e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return (Floats)((Ints)p + ((Ints)shifted << 23));
}

// Products in float with vectors, for float tensors and for bf16 ones where there are no tiles.
struct VectorEngine {
    using Number = float;
    static constexpr int64_t K = 16;
    struct Session {};

    template <typename X>
    static INLINE void load(const X* from, int64_t count, float* line) {
        *(Floats*)line = count >= 16 ? widen(from) : widen_some(from, count);
    }

    // A row of a left operand, from columns 32 j to 32 j + 31.
    static INLINE void put_left(float* left, int64_t step, int64_t j, int64_t row, Floats x, Floats y) {
        *(Floats*)(left + 2 * j * step + row * 16) = x;
        *(Floats*)(left + (2 * j + 1) * step + row * 16) = y;
    }
    // Rows 2 i and 2 i + 1 of a panel of a right operand.
    static INLINE void put_right(float* panel, int64_t i, Floats x, Floats y) {
        *(Floats*)(panel + 2 * i * 16) = x;
        *(Floats*)(panel + (2 * i + 1) * 16) = y;
    }
    // Left operand (rows, dimensions) -> right operand (rows, dimensions), `rows` being summed over.
    static void left_to_right(const float* left, float* right, int64_t rows, int64_t width) {
        std::memcpy(right, left, rows * width * sizeof(float));
    }

    template <int R, int P, bool ADD>
    static INLINE void block(int64_t lines, const float* a, int64_t a_step, const float* b, int64_t b_step, float* c,
                             int64_t c_step) {
        constexpr int PARTS = 16 / EACH, N = P * PARTS;  // of a panel, of all
        Some acc[R][N];
        auto in = [](auto* at, int64_t step, int n) { return at + n / PARTS * step + n % PARTS * EACH; };
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) acc[r][n] = ADD ? *(const Some*)in(c + r * 16, c_step, n) : Some{};
        for (int64_t line = 0; line < lines; line++, a += a_step)
#pragma GCC unroll 4
            for (int k = 0; k < 16; k++, b += 16)
#pragma GCC unroll 16
                for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                    for (int n = 0; n < N; n++) acc[r][n] += a[r * 16 + k] * *(const Some*)in(b, b_step, n);
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++) *(Some*)in(c + r * 16, c_step, n) = acc[r][n];
    }

    // result (rows, 16 panels) = or += left · right, over `lines` lines; the steps are elements between lines or panels.
    template <bool ADD>
    static APART void multiply(int64_t rows, int64_t panels, int64_t lines, const float* a, int64_t a_step, const float* b,
                         int64_t b_step, float* c, int64_t c_step) {
#ifdef WIDE_VECTORS
        constexpr int R = 8, P = 2;  // 16 sums of the 32 registers
#else
        constexpr int R = 4, P = 1;
#endif
        int64_t p = 0;
        for (; p + P <= panels; p += P)
            for (int64_t r = 0; r < rows; r += R)
                block<R, P, ADD>(lines, a + r * 16, a_step, b + p * b_step, b_step, c + p * c_step + r * 16, c_step);
        for (; p < panels; p++)
            for (int64_t r = 0; r < rows; r += R)
                block<R, 1, ADD>(lines, a + r * 16, a_step, b + p * b_step, b_step, c + p * c_step + r * 16, c_step);
    }
};

#ifdef LORAFIT_TILES
// Products of bf16 with tiles: 16 rows of 64 bytes, two tiles by two so that every load is used twice.
struct TileEngine {
    using Number = bf16;
    static constexpr int64_t K = 32;

    // Tiles are configured per thread, and released because other libraries set their own shapes.
    struct Session {
        Session() { tiles::configure(); }
        ~Session() { tiles::release(); }
    };

    static INLINE void load(const bf16* from, int64_t count, bf16* line) {
        if (count >= 32) {
            std::memcpy(line, from, 64);
        } else {
            std::memset(line, 0, 64);
            std::memcpy(line, from, count * sizeof(bf16));
        }
    }

    static INLINE __m512i pack(Floats low, Floats high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
    static INLINE __m512i zip() {
        return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                3, 18, 2, 17, 1, 16, 0);
    }
    static INLINE void put_left(bf16* left, int64_t step, int64_t j, int64_t row, Floats x, Floats y) {
        _mm512_store_si512(left + j * step + row * 32, pack(x, y));
    }
    static INLINE void put_right(bf16* panel, int64_t i, Floats x, Floats y) {
        _mm512_store_si512(panel + i * 32, _mm512_permutexvar_epi16(zip(), pack(x, y)));
    }
    static void left_to_right(const bf16* left, bf16* right, int64_t rows, int64_t width) {
        for (int64_t line = 0; line < width / 32; line++)
            for (int64_t r = 0; r < rows; r += 2) {
                const __m256i* from = (const __m256i*)(left + (line * rows + r) * 32);
                for (int half = 0; half < 2; half++) {
                    __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(from[half]), from[2 + half], 1);
                    _mm512_store_si512(right + ((2 * line + half) * (rows / 2) + r / 2) * 32,
                                       _mm512_permutexvar_epi16(zip(), both));
                }
            }
    }

    // Rows and panels are even numbers of tiles, thanks to the padding.
    template <bool ADD>
    static APART void multiply(int64_t rows, int64_t panels, int64_t lines, const bf16* a, int64_t a_step, const bf16* b,
                         int64_t b_step, float* c, int64_t c_step) {
        for (int64_t p = 0; p < panels; p += 2)
            for (int64_t r = 0; r < rows; r += 32) {
                const bf16* y = b + p * b_step;
                float* to = c + p * c_step + r * 16;
                tiles::sum<2, ADD>(a + r * 32, 512, a_step, y, y + b_step, 512, lines, to, to + c_step, 16);
            }
    }
};
#endif

// Tokens of one head: `stride` elements from one token to the next.
template <typename X>
struct Rows {
    X* at;
    int64_t stride;
    Rows from(int64_t token, int64_t offset) const { return {at + token * stride + offset, stride}; }
};

// Documents lie end to end. One of them may be the beginning of others, which then have of themselves only what follows:
// their queries see the keys of the beginning, then their own. Tokens are counted from the beginning's first.
struct Shape {
    const int64_t *starts, *before;  // before[doc]: the one that a document goes on from, or -1
    int64_t docs, heads, kv_heads, dim;
    float scale;
    int64_t window;  // the largest number of tokens a query may see, itself among them
    int threads;

    int64_t group() const { return heads / kv_heads; }
    int64_t own(int64_t doc) const { return starts[doc + 1] - starts[doc]; }
    // The first token of its own, and so the first with a query here.
    int64_t first(int64_t doc) const { return before[doc] < 0 ? 0 : own(before[doc]); }
    int64_t length(int64_t doc) const { return first(doc) + own(doc); }
    // Where in the row a token is.
    int64_t at(int64_t doc, int64_t token) const {
        const int64_t other = first(doc);
        return token < other ? starts[before[doc]] + token : starts[doc] + token - other;
    }
    // The first key, in whole SUBs, that any query of the SUB at `query` sees.
    int64_t first_key(int64_t query) const { return query < window ? 0 : (query - window + 1) / SUB * SUB; }
};

constexpr int64_t whole(int64_t n, int64_t grain) { return (n + grain - 1) / grain * grain; }

// Rows `begin` to `end` of a left operand (padded, width), from as many tokens.
template <class Engine, typename X>
APART void copy(Rows<const X> from, int64_t begin, int64_t end, int64_t padded, int64_t dim, int64_t width,
                typename Engine::Number* left) {
    constexpr int64_t K = Engine::K;
    for (int64_t r = begin; r < end; r++)
        for (int64_t j = 0; j < width; j += K)
            Engine::load(from.at + (r - begin) * from.stride + j, dim - j, left + (j / K * padded + r) * K);
}

template <class Engine>
APART void clear(int64_t begin, int64_t end, int64_t padded, int64_t width, typename Engine::Number* left) {
    constexpr int64_t K = Engine::K;
    for (int64_t j = 0; j < width; j += K) std::memset(left + (j / K * padded + begin) * K, 0, (end - begin) * 64);
}

// A left operand (padded, width): rows `first` to `rows` are the tokens from `from` on, those before and after are zero.
template <class Engine, typename X>
void pack(Rows<const X> from, int64_t first, int64_t rows, int64_t padded, int64_t dim, int64_t width,
          typename Engine::Number* left) {
    clear<Engine>(0, first, padded, width, left);
    copy<Engine, X>(from, first, rows, padded, dim, width, left);
    clear<Engine>(rows, padded, padded, width, left);
}

// A left operand (padded, width) of a document's keys or values, `count` tokens from `begin`; the padding is zero.
template <class Engine, typename X>
void pack_keys(const Shape& s, int64_t doc, Rows<const X> x, int64_t offset, int64_t begin, int64_t count, int64_t padded,
               int64_t width, typename Engine::Number* left) {
    const int64_t shared = std::clamp<int64_t>(s.first(doc) - begin, 0, count);
    if (shared) copy<Engine, X>(x.from(s.at(doc, begin), offset), 0, shared, padded, s.dim, width, left);
    if (shared < count) copy<Engine, X>(x.from(s.at(doc, begin + shared), offset), shared, count, padded, s.dim, width, left);
    clear<Engine>(count, padded, padded, width, left);
}

// Left operand (rows, dimensions) -> right operand (dimensions, rows), the dimensions being summed over.
template <class Engine>
void turn(const typename Engine::Number* left, typename Engine::Number* right, int64_t rows, int64_t width) {
    constexpr int64_t K = Engine::K;
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t line = 0; line < width / K; line++)
            transpose(left + (line * rows + r) * K, 64, right + (r / 16 * (width / K) + line) * 16 * K, 64);
}

// Right operand (rows, dimensions) -> left operand (dimensions, rows), the rows being summed over in both.
template <class Engine>
void flip(const typename Engine::Number* right, typename Engine::Number* left, int64_t rows, int64_t width) {
    constexpr int64_t K = Engine::K;
    for (int64_t d = 0; d < width; d += 16)
        for (int64_t line = 0; line < rows / K; line++)
            transpose(right + d * rows + line * 16 * K, 64, left + (line * width + d) * K, 64);
}

// Scores that a query must not see become -inf. `scores` is a result (SUB, panels) for queries from i0 and keys from j0.
APART void mask(float* scores, int64_t panels, int64_t i0, int64_t j0, int64_t window) {
    const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t p = 0; p < panels; p++) {
        int64_t ahead = i0 - (j0 + 16 * p);  // how far the first query is ahead of the panel's first key
        if (ahead >= 15 && ahead + SUB - 1 < window) continue;
        for (int64_t r = 0; r < SUB; r++) {
            Floats& row = *(Floats*)(scores + (p * SUB + r) * 16);
            Ints distance = (int32_t)(ahead + r) - lane;
            row = (distance >= 0) & (distance < (int32_t)std::min<int64_t>(window, INT32_MAX)) ? row : all(-INFINITY);
        }
    }
}

// A row of a result times a factor, to memory.
template <typename X>
INLINE void put(const float* row, int64_t panel, int64_t dim, float factor, X* to) {
    for (int64_t d = 0; d < dim; d += 16, row += panel) {
        Floats x = *(const Floats*)row * factor;
        if (dim - d >= 16)
            narrow(x, to + d);
        else
            narrow_some(x, to + d, dim - d);
    }
}

// Memory of a thread that lives as long as the thread: fresh pages for every call would cost more than the work on them.
class Scratch {
    char* memory = nullptr;
    size_t size = 0, used = 0;

public:
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {  // false where there isn't as much
        used = 0;
        if (bytes <= size) return true;
        std::free(memory);
        memory = (char*)std::aligned_alloc(64, whole(bytes, 4096));
        size = memory ? whole(bytes, 4096) : 0;
        return memory;
    }
    template <typename T>
    T* take(int64_t count) {
        T* taken = (T*)(memory + used);
        used += whole(count * sizeof(T), 64);
        if (used > size) std::abort();  // reserved too little: a mistake of ours
        return taken;
    }
};

struct Unit {
    int64_t doc, kv_head, begin, cost;
};

// Units in falling order of cost: handed out so, the small ones fill the gaps at the end.
void order(std::vector<Unit>& units) {
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
}

Scratch& own_scratch() {
    static thread_local Scratch scratch;
    return scratch;
}

// False where a thread found no memory for its scratch; then nothing is begun, since units wait for one another.
template <class Engine, class Work>
bool run(const std::vector<Unit>& units, int threads, size_t scratch_bytes, const Work& work) {
    std::atomic<size_t> next{0};
    std::atomic<bool> fine{true};
#pragma omp parallel num_threads(threads)
    {
        Scratch& scratch = own_scratch();
        if (!scratch.reserve(scratch_bytes)) fine = false;
#pragma omp barrier
        typename Engine::Session session;
        (void)session;
        for (size_t i; fine && (i = next.fetch_add(1)) < units.size();) {
            scratch.reserve(scratch_bytes);
            work(units[i], scratch);
        }
    }
    return fine;
}

// Forward: a unit is a stretch of a document's queries, for all the query heads of one kv head.
template <class Engine, typename X>
bool forward(const Shape& s, Rows<const X> q, Rows<const X> k, Rows<const X> v, X* out, float* lse) {
    using Number = typename Engine::Number;
    constexpr int64_t K = Engine::K;
    const int64_t dim = s.dim, width = whole(dim, K), group = s.group(), tokens = s.starts[s.docs];
    const int64_t stretch = std::min<int64_t>(256, std::max<int64_t>(SUB, FORWARD_ROWS / group / SUB * SUB));
    const float scale = s.scale * LOG2E;
    std::vector<Unit> units;
    int64_t longest = 0;
    for (int64_t doc = 0; doc < s.docs; doc++)
        for (int64_t begin = s.first(doc) / SUB * SUB; begin < s.length(doc); begin += stretch)
            for (int64_t head = 0; head < s.kv_heads; head++) {
                int64_t end = std::min(begin + stretch, s.length(doc));
                longest = std::max(longest, whole(end - begin, SUB));
                units.push_back({doc, head, begin, (end - s.first_key(begin)) * (end - begin)});
            }
    const int64_t rows = longest * group;
    const size_t bytes = (rows * width + 3 * KEYS * width + SUB * KEYS) * sizeof(Number) +
                         (rows * width + rows * 17 + SUB * KEYS) * sizeof(float) + 64 * 16;

    order(units);
    return run<Engine>(units, s.threads, bytes, [&](const Unit& unit, Scratch& scratch) {
        const int64_t begin = unit.begin, ahead = std::max<int64_t>(0, s.first(unit.doc) - begin);
        const int64_t count = std::min(stretch, s.length(unit.doc) - begin), subs = whole(count, SUB) / SUB;
        Number* queries = scratch.take<Number>(subs * group * SUB * width);  // (head, sub) after (head, sub)
        Number* raw = scratch.take<Number>(KEYS * width);
        Number* keys = scratch.take<Number>(KEYS * width);
        Number* values = scratch.take<Number>(KEYS * width);
        Number* weights = scratch.take<Number>(SUB * KEYS);
        float* scores = scratch.take<float>(SUB * KEYS);
        float* sums = scratch.take<float>(subs * group * SUB * width);
        Floats* total = scratch.take<Floats>(subs * group * SUB);
        float* top = scratch.take<float>(subs * group * SUB);
        for (int64_t g = 0; g < group; g++)
            for (int64_t sub = 0; sub < subs; sub++) {
                const int64_t first = sub ? 0 : ahead;  // less than a SUB
                pack<Engine, X>(q.from(s.at(unit.doc, begin + sub * SUB + first), (unit.kv_head * group + g) * dim), first,
                             std::min(SUB, count - sub * SUB), SUB, dim, width, queries + (g * subs + sub) * SUB * width);
            }

        const int64_t last = begin + subs * SUB;
        for (int64_t j0 = s.first_key(begin); j0 < last; j0 += KEYS) {
            const int64_t j1 = std::min(j0 + KEYS, last), padded = j1 - j0;
            const int64_t real = std::min(j1, s.length(unit.doc)) - j0;
            pack_keys<Engine, X>(s, unit.doc, k, unit.kv_head * dim, j0, real, padded, width, raw);
            turn<Engine>(raw, keys, padded, width);
            pack_keys<Engine, X>(s, unit.doc, v, unit.kv_head * dim, j0, real, padded, width, raw);
            Engine::left_to_right(raw, values, padded, width);
            for (int64_t g = 0; g < group; g++)
                for (int64_t sub = 0; sub < subs; sub++) {
                    const int64_t i0 = begin + sub * SUB, index = g * subs + sub;
                    const int64_t low = std::max(j0, s.first_key(i0)), high = std::min(j1, i0 + SUB);
                    if (low >= high) continue;
                    const bool fresh = j0 <= s.first_key(i0);  // nothing has been summed up yet
                    const int64_t panels = (high - low) / 16;
                    Engine::template multiply<false>(SUB, panels, width / K, queries + index * SUB * width, SUB * K,
                                                     keys + (low - j0) * width, 16 * width, scores, SUB * 16);
                    mask(scores, panels, i0, low, s.window);
                    float* sum_rows = sums + index * SUB * width;
                    for (int64_t r = 0; r < SUB; r++) {
                        const float* row = scores + r * 16;
                        Floats most = all(-INFINITY);
                        for (int64_t p = 0; p < panels; p++) most = greater(*(Floats*)(row + p * SUB * 16), most);
                        // Finite even for a row that sees nothing here, so that its weights are 0 and not NaN.
                        float before = fresh ? -1e30f : top[index * SUB + r];
                        float now = std::max(before, largest(most) * scale);
                        Floats sum0 = {}, sum1 = {};
                        for (int64_t p = 0; p < panels; p += 2) {
                            Floats x = exp2(*(Floats*)(row + p * SUB * 16) * scale - now);
                            Floats y = exp2(*(Floats*)(row + (p + 1) * SUB * 16) * scale - now);
                            sum0 += x;
                            sum1 += y;
                            Engine::put_left(weights, SUB * K, p / 2, r, x, y);
                        }
                        Floats& all_sum = total[index * SUB + r];
                        top[index * SUB + r] = now;
                        if (fresh) {
                            all_sum = sum0 + sum1;
                        } else {
                            Floats shrink = exp2(all(before - now));
                            all_sum = all_sum * shrink + (sum0 + sum1);
                            if (now != before)
                                for (int64_t d = 0; d < width; d += 16) *(Floats*)(sum_rows + d * SUB + r * 16) *= shrink;
                        }
                    }
                    const Number* seen = values + (low - j0) * 16;
                    if (fresh)
                        Engine::template multiply<false>(SUB, width / 16, (high - low) / K, weights, SUB * K, seen,
                                                         padded * 16, sum_rows, SUB * 16);
                    else
                        Engine::template multiply<true>(SUB, width / 16, (high - low) / K, weights, SUB * K, seen,
                                                        padded * 16, sum_rows, SUB * 16);
                }
        }
        for (int64_t g = 0; g < group; g++)
            for (int64_t i = ahead; i < count; i++) {
                const int64_t head = unit.kv_head * group + g, row = g * subs * SUB + i;
                const int64_t token = s.at(unit.doc, begin + i);
                const float sum_all = sum(total[row]);
                lse[head * tokens + token] = top[row] + std::log2(sum_all);
                put(sums + row / SUB * SUB * width + row % SUB * 16, SUB * 16, dim, 1.0f / sum_all,
                    out + (token * s.heads + head) * dim);
            }
    });
}

// Lets units add to the same sums in a fixed order. Whoever is waited for has begun: units are handed out in order.
INLINE void await(const std::atomic<int64_t>& turn, int64_t mine) {
    for (int64_t spins = 0; turn.load(std::memory_order_acquire) != mine; spins++) {
#if defined(__linux__) || defined(__APPLE__)
        if (spins > 1000) sched_yield();
#endif
    }
}

// Backward: a unit is a chunk of a document's keys, for all the query heads of their kv head. It owns dK and dV of the chunk
// and adds its part to dQ when the chunks before it have.
template <class Engine, typename X>
bool backward(const Shape& s, Rows<const X> q, Rows<const X> k, Rows<const X> v, const X* out, const float* lse,
              const X* dout, Rows<X> dq, Rows<X> dk, Rows<X> dv) {
    using Number = typename Engine::Number;
    constexpr int64_t K = Engine::K;
    const int64_t dim = s.dim, width = whole(dim, K), group = s.group(), tokens = s.starts[s.docs], flat = s.heads * dim;
    const float scale = s.scale * LOG2E;
    std::vector<Unit> units;
    std::vector<int64_t> first_block(s.docs), first_sum(s.docs);  // of a document, in `turns` and `parts`
    int64_t blocks = 0, parked = 0, chunk_rows = 0, block_rows = 0;
    for (int64_t doc = 0; doc < s.docs; doc++) {
        const int64_t length = s.length(doc);
        first_block[doc] = blocks;
        first_sum[doc] = parked;
        if (length > CHUNK) blocks += whole(length, QUERIES) / QUERIES, parked += whole(length, SUB);
        chunk_rows = std::max(chunk_rows, whole(std::min(length, CHUNK), SUB));
        block_rows = std::max(block_rows, whole(std::min(length, QUERIES), SUB));
        // What is left of the document stands for the cost, and puts the chunks of a document in order, as `await` needs.
        for (int64_t begin = 0; begin < length; begin += CHUNK)
            for (int64_t head = 0; head < s.kv_heads; head++) units.push_back({doc, head, begin, length - begin});
    }
    // dK and dV of a beginning come from several documents: each one's part, (token, key or value, head, dim), until all are there.
    std::vector<int64_t> first_part(s.docs, -1), begins;  // of a document, in `shared`; the beginnings
    std::vector<std::vector<int64_t>> sharers(s.docs);    // the documents that go on from each
    const int64_t padded_dim = whole(dim, 16), part_size = 2 * s.kv_heads * padded_dim;
    int64_t part_tokens = 0;
    for (int64_t doc = 0; doc < s.docs; doc++)
        if (const int64_t other = s.before[doc]; other >= 0) {
            sharers[other].push_back(doc);
            for (int64_t sharer : {other, doc})
                if (first_part[sharer] < 0) {
                    first_part[sharer] = part_tokens;
                    part_tokens += s.own(other);
                    if (sharer == other) begins.push_back(other);
                }
        }
    std::unique_ptr<float, void (*)(void*)> shared(nullptr, std::free);
    if (part_tokens) {
        shared.reset((float*)std::aligned_alloc(64, part_tokens * part_size * sizeof(float)));
        if (!shared) return false;
    }
    // dQ of documents of several chunks, until the last has been added.
    std::unique_ptr<float, void (*)(void*)> parts(nullptr, std::free);
    std::unique_ptr<std::atomic<int64_t>[]> turns(new std::atomic<int64_t>[blocks * s.kv_heads + 1]);
    for (int64_t i = 0; i < blocks * s.kv_heads; i++) turns[i] = 0;
    if (parked) {
        parts.reset((float*)std::aligned_alloc(64, parked * s.heads * width * sizeof(float)));
        if (!parts) return false;
    }
    const size_t bytes = (4 * chunk_rows * width + 3 * QUERIES * width * 2 + 2 * QUERIES * chunk_rows + SUB * chunk_rows) *
                             sizeof(Number) +
                         (2 * chunk_rows * width + 2 * SUB * chunk_rows + SUB * width + 2 * QUERIES) * sizeof(float) + 64 * 32;

    order(units);
    const bool fine = run<Engine>(units, s.threads, bytes, [&](const Unit& unit, Scratch& scratch) {
        const int64_t length = s.length(unit.doc), begin = unit.begin, chunk = begin / CHUNK, asked = s.first(unit.doc);
        const int64_t count = std::min(CHUNK, length - begin), padded = whole(count, SUB);
        Number* raw = scratch.take<Number>(padded * width);
        Number* keys = scratch.take<Number>(padded * width);        // right (dim, keys)
        Number* keys_again = scratch.take<Number>(padded * width);  // right (keys, dim)
        Number* values = scratch.take<Number>(padded * width);      // right (dim, keys)
        Number* queries = scratch.take<Number>(QUERIES * width);    // left (queries, dim), a SUB after the other
        Number* queries_t = scratch.take<Number>(QUERIES * width);  // left (dim, queries)
        Number* douts = scratch.take<Number>(QUERIES * width);
        Number* douts_t = scratch.take<Number>(QUERIES * width);
        Number* paired = scratch.take<Number>(SUB * width);
        Number* weights = scratch.take<Number>(QUERIES * padded);   // right (queries, keys)
        Number* dscores = scratch.take<Number>(QUERIES * padded);   // right (queries, keys)
        Number* dscores_l = scratch.take<Number>(SUB * padded);     // left (queries, keys)
        float* dkeys = scratch.take<float>(padded * width);         // result (dim, keys)
        float* dvalues = scratch.take<float>(padded * width);
        float* scores = scratch.take<float>(SUB * padded);
        float* dweights = scratch.take<float>(SUB * padded);
        float* dquery = scratch.take<float>(SUB * width);
        float* row_lse = scratch.take<float>(QUERIES);
        float* row_dot = scratch.take<float>(QUERIES);

        pack_keys<Engine, X>(s, unit.doc, v, unit.kv_head * dim, begin, count, padded, width, raw);
        turn<Engine>(raw, values, padded, width);
        pack_keys<Engine, X>(s, unit.doc, k, unit.kv_head * dim, begin, count, padded, width, raw);
        turn<Engine>(raw, keys, padded, width);
        Engine::left_to_right(raw, keys_again, padded, width);
        std::memset(dkeys, 0, padded * width * sizeof(float));
        std::memset(dvalues, 0, padded * width * sizeof(float));

        for (int64_t i0 = std::max(begin, asked / QUERIES * QUERIES); i0 < length && s.first_key(i0) < begin + padded; i0 += QUERIES) {
            const int64_t rows = std::min(QUERIES, length - i0), subs = whole(rows, SUB) / SUB;
            const int64_t first_sub = std::max<int64_t>(0, asked - i0) / SUB;
            const int64_t block = (first_block[unit.doc] + i0 / QUERIES) * s.kv_heads + unit.kv_head;
            const int64_t first_chunk = s.first_key(i0) / CHUNK;
            bool ours = length <= CHUNK || chunk == first_chunk;  // nobody to wait for, or already waited
            for (int64_t g = 0; g < group; g++) {
                const int64_t head = unit.kv_head * group + g;
                for (int64_t sub = first_sub; sub < subs; sub++) {
                    const int64_t i = i0 + sub * SUB, here = std::min(SUB, rows - sub * SUB);
                    const int64_t first = std::max<int64_t>(0, asked - i), token = s.at(unit.doc, i + first);
                    const int64_t low = std::max(begin, s.first_key(i)), high = std::min(begin + padded, i + SUB);
                    if (low >= high) continue;
                    Number *query = queries + sub * SUB * width, *dresult = douts + sub * SUB * width;
                    pack<Engine, X>(q.from(token, head * dim), first, here, SUB, dim, width, query);
                    Engine::left_to_right(query, paired, SUB, width);
                    flip<Engine>(paired, queries_t + sub * SUB * width, SUB, width);
                    pack<Engine, X>(Rows<const X>{dout + token * flat + head * dim, flat}, first, here, SUB, dim, width, dresult);
                    Engine::left_to_right(dresult, paired, SUB, width);
                    flip<Engine>(paired, douts_t + sub * SUB * width, SUB, width);
                    for (int64_t r = 0; r < SUB; r++) {
                        row_lse[r] = row_dot[r] = 0;
                        if (r < first || r >= here) continue;
                        const int64_t at = token + r - first;
                        const X *a = dout + at * flat + head * dim, *b = out + at * flat + head * dim;
                        Floats dot = {};
                        int64_t d = 0;
                        for (; d + 16 <= dim; d += 16) dot += widen(a + d) * widen(b + d);
                        if (d < dim) dot += widen_some(a + d, dim - d) * widen_some(b + d, dim - d);
                        row_dot[r] = sum(dot);
                        row_lse[r] = lse[head * tokens + at];
                    }
                    const int64_t panels = (high - low) / 16, skipped = low - begin;
                    Engine::template multiply<false>(SUB, panels, width / K, query, SUB * K, keys + skipped * width,
                                                     16 * width, scores, SUB * 16);
                    Engine::template multiply<false>(SUB, panels, width / K, dresult, SUB * K, values + skipped * width,
                                                     16 * width, dweights, SUB * 16);
                    mask(scores, panels, i, low, s.window);
                    for (int64_t p = 0; p < panels; p += 2)
                        for (int64_t r = 0; r < SUB; r += 2) {
                            Floats weight[2][2], dscore[2][2];
                            for (int x = 0; x < 2; x++)
                                for (int y = 0; y < 2; y++) {
                                    const int64_t at = (p + y) * SUB * 16 + (r + x) * 16;
                                    weight[x][y] = exp2(*(Floats*)(scores + at) * scale - row_lse[r + x]);
                                    dscore[x][y] = weight[x][y] * (*(Floats*)(dweights + at) - row_dot[r + x]);
                                }
                            for (int y = 0; y < 2; y++) {
                                const int64_t panel = (skipped + (p + y) * 16) * QUERIES, pair = (sub * SUB + r) / 2;
                                Engine::put_right(weights + panel, pair, weight[0][y], weight[1][y]);
                                Engine::put_right(dscores + panel, pair, dscore[0][y], dscore[1][y]);
                            }
                            for (int x = 0; x < 2; x++)
                                Engine::put_left(dscores_l, SUB * K, p / 2, r + x, dscore[x][0], dscore[x][1]);
                        }
                    Engine::template multiply<false>(SUB, width / 16, (high - low) / K, dscores_l, SUB * K,
                                                     keys_again + skipped * 16, padded * 16, dquery, SUB * 16);
                    const bool opens = chunk == s.first_key(i) / CHUNK, closes = chunk == i / CHUNK;
                    if (!opens || !closes) {
                        float* part = parts.get() + ((first_sum[unit.doc] + i) * s.heads + head * SUB) * width;
                        if (!ours) await(turns[block], chunk - first_chunk);
                        ours = true;
                        float *to = closes ? dquery : part, *from = closes ? part : dquery;
                        if (opens)
                            std::memcpy(part, dquery, SUB * width * sizeof(float));
                        else
                            for (int64_t d = 0; d < SUB * width; d += 16) *(Floats*)(to + d) += *(Floats*)(from + d);
                    }
                    if (closes)
                        for (int64_t r = first; r < here; r++)
                            put(dquery + r * 16, SUB * 16, dim, s.scale, dq.from(token + r - first, head * dim).at);
                }
                // For 32 keys at a time, the queries of this block that see any of them.
                for (int64_t j = 0; j < padded; j += SUB) {
                    const int64_t key = begin + j;
                    int64_t low = std::max(first_sub, (key - i0) / SUB), high = subs;
                    while (high > low && s.first_key(i0 + (high - 1) * SUB) > key) high--;
                    if (low >= high) continue;
                    const int64_t at = low * SUB * width, lines = (high - low) * SUB / K;
                    const int64_t from = j * QUERIES + low * SUB * 16;
                    Engine::template multiply<true>(width, 2, lines, douts_t + at, width * K, weights + from, QUERIES * 16,
                                                    dvalues + j * width, width * 16);
                    Engine::template multiply<true>(width, 2, lines, queries_t + at, width * K, dscores + from, QUERIES * 16,
                                                    dkeys + j * width, width * 16);
                }
            }
            if (length > CHUNK) {
                if (!ours) await(turns[block], chunk - first_chunk);  // a block whose SUBs had all to be opened here
                turns[block].store(chunk - first_chunk + 1, std::memory_order_release);
            }
        }
        for (int64_t j = 0; j < padded; j += 16)
            for (int64_t d = 0; d < dim; d += 16) {
                alignas(64) float turned[2][256];
                transpose(dkeys + j * width + d * 16, 64, turned[0], 64);
                transpose(dvalues + j * width + d * 16, 64, turned[1], 64);
                for (int64_t r = 0; r < std::min<int64_t>(16, count - j); r++) {
                    const int64_t token = begin + j + r;
                    if (token < asked || (s.before[unit.doc] < 0 && first_part[unit.doc] >= 0)) {
                        float* part = shared.get() + (first_part[unit.doc] + token) * part_size + unit.kv_head * padded_dim + d;
                        *(Floats*)part = *(Floats*)(turned[0] + r * 16) * s.scale;
                        *(Floats*)(part + s.kv_heads * padded_dim) = *(Floats*)(turned[1] + r * 16);
                        continue;
                    }
                    const int64_t row = s.at(unit.doc, token), offset = unit.kv_head * dim + d, some = std::min<int64_t>(16, dim - d);
                    put(turned[0] + r * 16, 0, some, s.scale, dk.from(row, offset).at);
                    put(turned[1] + r * 16, 0, some, 1.0f, dv.from(row, offset).at);
                }
            }
    });
    if (!fine) return false;
    for (const int64_t other : begins) {
#pragma omp parallel for num_threads(s.threads)
        for (int64_t token = 0; token < s.own(other); token++) {
            float* whole_part = shared.get() + (first_part[other] + token) * part_size;
            for (const int64_t doc : sharers[other])
                for (int64_t d = 0; d < part_size; d += 16)
                    *(Floats*)(whole_part + d) += *(Floats*)(shared.get() + (first_part[doc] + token) * part_size + d);
            for (int64_t head = 0; head < s.kv_heads; head++) {
                put(whole_part + head * padded_dim, 16, dim, 1.0f, dk.from(s.starts[other] + token, head * dim).at);
                put(whole_part + (s.kv_heads + head) * padded_dim, 16, dim, 1.0f, dv.from(s.starts[other] + token, head * dim).at);
            }
        }
    }
    return true;
}

Shape shape(const int64_t* starts, const int64_t* before, int64_t docs, int64_t heads, int64_t kv_heads, int64_t dim,
            float scale, int64_t window, int threads) {
    return {starts, before, docs, heads, kv_heads, dim, scale, window > 0 ? window : INT64_MAX / 2, std::max(threads, 1)};
}

// With tiles where there are any for this type of number.
template <typename X>
bool best_forward(const Shape& s, Rows<const X> q, Rows<const X> k, Rows<const X> v, X* out, float* lse) {
#ifdef LORAFIT_TILES
    if constexpr (std::is_same_v<X, bf16>)
        if (tiles::permitted()) return forward<TileEngine, X>(s, q, k, v, out, lse);
#endif
    return forward<VectorEngine, X>(s, q, k, v, out, lse);
}

template <typename X>
bool best_backward(const Shape& s, Rows<const X> q, Rows<const X> k, Rows<const X> v, const X* out, const float* lse,
              const X* dout, Rows<X> dq, Rows<X> dk, Rows<X> dv) {
#ifdef LORAFIT_TILES
    if constexpr (std::is_same_v<X, bf16>)
        if (tiles::permitted()) return backward<TileEngine, X>(s, q, k, v, out, lse, dout, dq, dk, dv);
#endif
    return backward<VectorEngine, X>(s, q, k, v, out, lse, dout, dq, dk, dv);
}

}  // namespace

// q (n, heads, dim), k and v (n, kv_heads, dim): the heads of a token are contiguous, tokens lie a stride of elements apart.
// out (n, heads, dim) contiguous; lse (heads, n): the base-2 logarithm of each row's sum of 2^(score * scale * log2 e).
// Document d is the tokens starts[d] to starts[d + 1], after those of document before[d] where that isn't -1; that one goes on
// from none. Of these, query i sees key j if 0 <= i - j, and < window where that isn't 0.
// scale > 0. Both return 0, or 1 where memory ran out. The backward takes what the forward wrote, and dout, laid out as out; dq, dk and dv have strides of their own.
#define ATTENTION(NAME, X)                                                                                             \
    KERNEL int attention_forward_##NAME(const X* q, int64_t q_stride, const X* k, int64_t k_stride, const X* v,        \
                                        int64_t v_stride, X* out, float* lse, const int64_t* starts,                   \
                                        const int64_t* before, int64_t docs, int64_t heads, int64_t kv_heads,          \
                                        int64_t dim, float scale, int64_t window, int threads) try {                   \
        Shape s = shape(starts, before, docs, heads, kv_heads, dim, scale, window, threads);                           \
        return best_forward<X>(s, {q, q_stride}, {k, k_stride}, {v, v_stride}, out, lse) ? 0 : 1;                      \
    } catch (const std::bad_alloc&) {                                                                                  \
        return 1;                                                                                                      \
    }                                                                                                                  \
    KERNEL int attention_backward_##NAME(const X* q, int64_t q_stride, const X* k, int64_t k_stride, const X* v,       \
                                         int64_t v_stride, const X* out, const float* lse, const X* dout, X* dq,       \
                                         int64_t dq_stride, X* dk, int64_t dk_stride, X* dv, int64_t dv_stride,        \
                                         const int64_t* starts, const int64_t* before, int64_t docs, int64_t heads,    \
                                         int64_t kv_heads, int64_t dim, float scale, int64_t window, int threads) try {\
        Shape s = shape(starts, before, docs, heads, kv_heads, dim, scale, window, threads);                           \
        bool fine = best_backward<X>(s, {q, q_stride}, {k, k_stride}, {v, v_stride}, out, lse, dout, {dq, dq_stride},  \
                                     {dk, dk_stride}, {dv, dv_stride});                                                \
        return fine ? 0 : 1;                                                                                           \
    } catch (const std::bad_alloc&) {                                                                                  \
        return 1;                                                                                                      \
    }

ATTENTION(f32, float)
ATTENTION(bf16, bf16)
