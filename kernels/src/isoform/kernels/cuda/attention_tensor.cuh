// What the tensor-core kernels have in common: tiles in shared memory, products, masks, which tiles to
// visit.
//
// Tiles are copied asynchronously, one ahead of the one that is computed with; what the mask and the
// softmax need of their tokens is read two ahead, since padding must not be copied.
//
// Defines: ELEMENT (1 or 2, see primitives.cuh); HEAD_DIM, a multiple of 16 and ≥ D; M_TILES; WARPS of
// a block; BLOCK, the rows of a tile that streams by, and CHUNK, those of them whose logits are in
// registers at a time; PLACES, whether positions or segments are given; ALIGNED, whether rows of all
// operands can be copied 16 bytes at a time; BLOCKS, for how many on a multiprocessor registers must
// do; SHARED_BYTES, what the host asks for.

#pragma once

#include "attention_mask.cuh"
#include "tensor_tiles.cuh"

constexpr int OWNED = WARPS * OWN;  // rows of a block
constexpr int THREADS = 32 * WARPS;
constexpr float LN_2 = 0.69314718f;

static_assert(OWNED % SPAN == 0 && SPAN % BLOCK == 0, "a tile is of one span, a block of whole ones");

using Logits = float[M_TILES][CHUNK / 8][4];
using PerRow = float[M_TILES][2];  // of rows lane / 4 and lane / 4 + 8 of each sixteen

// --- From the operands to shared memory, and back ------------------------------------------------

// Starts to copy SIZE positions of x[b, :, h, :] from `first` on, by COPIERS threads of which this is
// one: those rows that are wanted, and zeros elsewhere. What is not wanted is not even read.
template <int SIZE, int COPIERS, class Wanted>
__device__ inline void load_rows(Row *tile, const AttentionArguments &a, const Operand &x,
                                 const Head &at, int64 first, int thread, Wanted wanted) {
    constexpr int PIECES = HEAD_DIM / 8;  // of eight elements each
    constexpr int PASS = COPIERS / PIECES;
    const int column = thread % PIECES * 8;
    int row = thread / PIECES;
    if (COPIERS % PIECES != 0 && row >= PASS) return;
    const int64 stride = ALIGNED ? 1 : x.stride[3];
    const int count = clamp(a.D - column, 0, 8);
    const Element *from = channels_of(x, at, first + row) + column * stride;
#pragma unroll
    for (int n = 0; n < (SIZE + PASS - 1) / PASS; ++n) {
        if (SIZE % PASS != 0 && row >= SIZE) break;
        Element *target = tile[row] + column;
        const int there = wanted(row) ? count : 0;
        if constexpr (ALIGNED) {
            cp_async_16(target, from, there > 0);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (e < there)
                    target[e] = from[e * stride];
                else
                    round_to(0.0f, target + e);
        }
        row += PASS;
        from += PASS * x.stride[1];
    }
}

// Whether pieces of eight elements of the last axis can be written as 16 bytes.
__device__ inline bool aligned(const Operand &x) {
    const int64 odd = static_cast<int64>(reinterpret_cast<cuda::std::uintptr_t>(x.data)) / 2 |
                      x.stride[0] | x.stride[1] | x.stride[2];
    return odd % 8 == 0 && x.stride[3] == 1;
}

// Writes a warp's rows of a result, positions of x[b, :, h, :] from `first` on, `end` excluded: row r
// times factor(r), or 0 where that is not alive(r), since beside NaN a factor of 0 would not do. By
// way of the warp's rows of shared memory, but for wide results.
template <class Factor, class Alive>
__device__ inline void store_rows(Row *tile, const Result &sums, const AttentionArguments &a,
                                  const Operand &x, const Head &at, int64 first, int64 end,
                                  Factor factor, Alive alive) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + lane() / 4 + 8 * half;
            const float by = factor(m, half);
            const bool kept = alive(m, half);
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n) {
                const int d = 8 * n + 2 * (lane() % 4);
                const float low = kept ? sums[m][n][2 * half] * by : 0.0f;
                const float high = kept ? sums[m][n][2 * half + 1] * by : 0.0f;
                if (a.wide) {
                    float *target = channels_of<float>(x, at, first + row) + d * x.stride[3];
                    if (first + row < end && d < a.D) target[0] = low;
                    if (first + row < end && d + 1 < a.D) target[x.stride[3]] = high;
                } else
                    *reinterpret_cast<unsigned *>(tile[row] + d) = pack(low, high);
            }
        }
    if (a.wide) return;
    __syncwarp();
    const bool by_16_bytes = aligned(x);
    for (int piece = lane(); piece < OWN * (HEAD_DIM / 8); piece += 32) {
        const int row = piece / (HEAD_DIM / 8), d = piece % (HEAD_DIM / 8) * 8;
        const int count = clamp(a.D - d, 0, 8);
        if (first + row >= end) break;
        Element *target = channels_of(x, at, first + row) + d * x.stride[3];
        if (by_16_bytes && count == 8)
            *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(tile[row] + d);
        else
            for (int e = 0; e < count; ++e) target[e * x.stride[3]] = tile[row][d + e];
    }
}

// --- The scale -----------------------------------------------------------------------------------

// Weights are 2^(c s − shift) with s = q · k, one instruction for scale and logarithm together, and the
// largest logit is that of the largest s. This wants c > 0: of a scale that is not, the sign, or 0, is
// multiplied into the rows that a block owns, which is exact.
struct Scale {
    float sign, factor, c;  // sign · factor = scale, c = factor · log₂ e

    __device__ explicit Scale(float scale)
        : sign(scale > 0 ? 1.0f : scale < 0 ? -1.0f : 0.0f), factor(scale == 0 ? 1.0f : fabsf(scale)),
          c(factor * LOG2_E) {}
};

// The warp's rows times the sign of the scale.
__device__ inline void apply_sign(Fragments &x, float sign) {
    if (sign == 1.0f) return;
    rarely();
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float2 pair = unpack(x[m][step][part]);
                x[m][step][part] = pack(pair.x * sign, pair.y * sign);
            }
}

// --- Products ------------------------------------------------------------------------------------

// acc[i, j] = Σ_d x[i, d] rows[j, d], where left(m, step) gives fragments of x.
template <class Left>
__device__ inline void multiply_over_channels(Logits &acc, const Row *rows, Left left) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        unsigned x[M_TILES][4];
        left(x, step);
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n += 2) {
            unsigned words[4];
            ldmatrix_x4(words, rows[8 * n + lane() % 8 + 8 * (lane() / 16)] + 16 * step +
                                   8 * (lane() / 8 % 2));
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][n], x[m], first);
                mma_m16n8k16<Element>(acc[m][n + 1], x[m], second);
            }
        }
    }
}

// With x in registers, or, for want of them, in shared memory.
__device__ inline void multiply_over_channels(Logits &acc, const Fragments &x, const Row *rows) {
    multiply_over_channels(acc, rows, [&](unsigned (&found)[M_TILES][4], int step) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int part = 0; part < 4; ++part) found[m][part] = x[m][step][part];
    });
}

__device__ inline void multiply_over_channels(Logits &acc, const Row *x, const Row *rows) {
    multiply_over_channels(acc, rows, [&](unsigned (&found)[M_TILES][4], int step) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) load_fragment(found[m], x, m, step);
    });
}

// --- The mask ------------------------------------------------------------------------------------

// What the mask needs besides indices.
struct alignas(16) Places {
#if PLACES
    Token own[OWNED], streamed[4][BLOCK];  // the latter of four tiles on end
    Span span;                             // of those owned
#endif
};

// What a block owns, and what streams by: queries and keys, or keys and queries.
template <bool OWNS_KEYS>
struct Sides {
    const AttentionArguments &a;
    int64 b, first;  // the first token that the block owns

    __device__ Sequence own() const { return OWNS_KEYS ? keys_of(a, b) : queries_of(a, b); }
    __device__ Sequence streamed() const { return OWNS_KEYS ? queries_of(a, b) : keys_of(a, b); }
    __device__ int64 length() const { return OWNS_KEYS ? a.Q : a.K; }

    __device__ bool may_attend(const Span &own, const Span &other) const {
        return OWNS_KEYS ? ::may_attend(a, other, own) : ::may_attend(a, own, other);
    }
    __device__ bool all_attend(const Span &own, const Span &other) const {
        return OWNS_KEYS ? ::all_attend(a, other, own) : ::all_attend(a, own, other);
    }

    // How far before and after itself a token that is owned looks, in tokens that stream by.
    __device__ int64 back() const { return OWNS_KEYS ? a.right : a.left; }
    __device__ int64 ahead() const { return OWNS_KEYS ? a.left : a.right; }

    // Of the token with index n that is owned, the first and the last index that it looks at.
    __device__ int begin(int64 n) const {
        return back() >= n ? 0 : clamp(n - back(), 0, static_cast<int>(length()));
    }
    __device__ int last(int64 n) const {
        const int most = static_cast<int>(length()) - 1;
        return ahead() >= length() ? most : clamp(n + ahead(), -1, most);
    }

    // Whether all pairs of what is owned with tile t attend. Rows beyond the end of what is owned are
    // not stored, so they may.
    __device__ bool whole(const Places &places, int t) const {
#if PLACES
        return all_attend(places.span, streamed().spans[t / (SPAN / BLOCK)]);
#else
        const int64 low = static_cast<int64>(t) * BLOCK, high = low + BLOCK - 1;
        return low >= begin(first + OWNED - 1) && high <= last(first);
#endif
    }

    // Fills in what is known of the tokens owned. A barrier must follow.
    __device__ void begin_with(Places &places) const {
#if PLACES
        for (int n = threadIdx.x; n < OWNED; n += THREADS) places.own[n] = own().token(first + n);
        if (threadIdx.x == 0) {
            Span span = no_token();
            for (int64 n = 0; n < OWNED && first + n < own().length; n += SPAN)
                span = together(span, own().spans[(first + n) / SPAN]);
            places.span = span;
        }
#endif
    }

    // Logits become −inf where the pair does not attend: those of the warp's rows from `row` of the
    // block on, and of the columns from `column` of tile t on, the n-th that is visited. A bit for
    // each, found first, keeps what is needed to find it out of the registers of the products.
    __device__ void hide(Logits &s, const Places &places, int row, int t, int n_th,
                         int column) const {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int own_row = row + 16 * m + lane() / 4 + 8 * half;
                unsigned seen = 0;
#if PLACES
                const Token own = places.own[own_row];
                const Token *others = places.streamed[n_th % 4] + column + 2 * (lane() % 4);
#pragma unroll 1
                for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const Token other = others[8 * n + e];
                        const bool sees =
                            OWNS_KEYS ? attends(a, other, own) : attends(a, own, other);
                        seen |= static_cast<unsigned>(sees) << (2 * n + e);
                    }
#else
                const int from = begin(first + own_row), to = last(first + own_row);
                const int other = t * BLOCK + column + 2 * (lane() % 4);
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        seen |= static_cast<unsigned>(other + 8 * n + e >= from &&
                                                      other + 8 * n + e <= to)
                                << (2 * n + e);
#endif
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if ((seen >> (2 * n + e) & 1) == 0) s[m][n][2 * half + e] = -infinity();
            }
    }
};

// The tiles that a block must look at, one after the other, and then −1. All warps find the same.
template <bool OWNS_KEYS>
struct Visits {
    int now;
#if PLACES
    // Groups of spans are looked at by the 32 lanes at once, and then the spans of those groups in
    // which any pair may attend. Both searches leave a bit for each that is still to be visited.
    int group, groups_from;
    unsigned spans, groups;

    __device__ void start() { now = -1, group = 0, groups_from = -32, spans = 0, groups = 0; }

    __device__ int next(const Sides<OWNS_KEYS> &sides, const Places &places) {
        constexpr int PER_SPAN = SPAN / BLOCK;
        if (now >= 0 && (now + 1) % PER_SPAN != 0 &&
            static_cast<int64>(now + 1) * BLOCK < sides.length())
            return ++now;
        const int end = static_cast<int>(groups_of(sides.length()));
        const Span *table = sides.streamed().spans;
        while (spans == 0) {
            while (groups == 0) {
                if (groups_from + 32 >= end) return now = -1;
                groups_from += 32;
                const int mine = groups_from + lane();
                groups = __ballot_sync(
                    ALL_LANES, mine < end && sides.may_attend(places.span, table[end * GROUP + mine]));
            }
            group = groups_from + __ffs(groups) - 1;
            groups &= groups - 1;
            spans = __ballot_sync(ALL_LANES,
                                  sides.may_attend(places.span, table[group * GROUP + lane()]));
        }
        now = (group * GROUP + __ffs(spans) - 1) * PER_SPAN;
        spans &= spans - 1;
        return now;
    }
#else
    __device__ void start() { now = -2; }

    __device__ int next(const Sides<OWNS_KEYS> &sides, const Places &) {
        if (now == -1) return -1;
        const int64 own = OWNS_KEYS ? sides.a.K : sides.a.Q;
        const int64 last_own = sides.first + OWNED < own ? sides.first + OWNED - 1 : own - 1;
        now = now < 0 ? sides.begin(sides.first) / BLOCK : now + 1;
        if (static_cast<int64>(now) * BLOCK > sides.last(last_own)) now = -1;
        return now;
    }
#endif
};

// --- Gradients -----------------------------------------------------------------------------------

// 2^(c s − shift) of a query's statistic: with shift = lse log₂ e it is p. Of a query without a key, or
// beyond the end, shift is +inf.
__device__ inline float shift_of(float lse) {
    return lse == -infinity() ? infinity() : lse * LOG2_E;
}

// The gradients of logits are rounded to be multiplied again. bfloat16 has the range of float; for
// float16 (rule SEQ-7) they are kept in units of a power of two, `unit`, which starts tiny and grows
// when one of them does not fit, with what was summed in it.
// The largest magnitude of the warp's numbers, those aside that are infinite by right.
__device__ inline float largest_magnitude(const Logits &x) {
    float most = 0.0f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (!isinf(x[m][n][e])) most = fmaxf(most, fabsf(x[m][n][e]));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, distance));
    return most;
}

__device__ inline void to_units(Logits &ds, float &unit, Result &sum) {
#if ELEMENT == 1
    const float units = 1.0f / unit;
    bool fits = true;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                ds[m][n][e] *= units;
                fits &= !(fabsf(ds[m][n][e]) > 32768.0f);
            }
    if (__all_sync(ALL_LANES, fits)) return;
    rarely();
    const float most = largest_magnitude(ds);
    if (most <= 32768.0f) return;
    const float by = exp2f(8.0f - ceilf(log2f(most)));  // the largest becomes about 2^8
    unit /= by;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[m][n][e] *= by;
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][n][e] *= by;
    }
#endif
}
