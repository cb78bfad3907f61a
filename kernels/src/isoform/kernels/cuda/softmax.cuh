// What the kernels of the masked softmax share: which keys of which row a thread has, which of them
// are attended to, and sums over a row.
//
// A row is a query's keys. ACROSS threads have it: each every ACROSS-th vector, so that what they read
// together is one piece of memory. A block has blockDim.y rows if they are of a warp's threads or
// fewer, so that none waits for another at a barrier, and else one.
//
// Defines: ELEMENT, WIDTH (see vectors.cuh), where WIDTH also divides the mask's rows; MASKED, 1 if
// there is a mask; ACROSS, a power of two; VECTORS, how many a thread reads before it computes.

#pragma once

#include "blocks.cuh"
#include "softmax_arguments.cuh"
#include "vectors.cuh"

constexpr int THREADS = ACROSS > 256 ? ACROSS : 256;  // of a block at most
constexpr int LANES = ACROSS < 32 ? ACROSS : 32;      // of a row that are of one warp
constexpr int WARPS = ACROSS / LANES;
constexpr int STEP = ACROSS * WIDTH;  // from a thread's vector to its next
constexpr float LOG2_E = 1.4426950408889634f;

// Bytes of the mask, as words: bytes a compiler takes apart where it reads them, and waits for them.
struct alignas(WIDTH) Bytes {
#if WIDTH < 4
    unsigned char at[WIDTH];
#else
    unsigned words[WIDTH / 4];
#endif
};

// Whether the mask lets key i through.
__device__ inline bool through(const Bytes &mask, int i) {
#if WIDTH < 4
    return mask.at[i];
#else
    return mask.words[i / 4] & 0xffu << i % 4 * 8;
#endif
}

// Whether it lets all through, as nearly every mask does nearly everywhere, or nothing: true is a 1. A
// byte of another number that is not 0 makes this false, and nothing else of it.
__device__ inline bool all_through(const Bytes &mask) {
#if WIDTH < 4
    bool all = true;
    for (int i = 0; i < WIDTH; ++i) all = all && mask.at[i];
    return all;
#else
    unsigned all = 0x01010101u;
    for (int i = 0; i < WIDTH / 4; ++i) all &= mask.words[i];
    return all == 0x01010101u;
#endif
}

// A row of a matrix by itself.
__device__ inline Matrix row_of(const Matrix &x, int64 row) {
    return {static_cast<Element *>(x.data) + row * x.stride, 0};
}

struct Row {
    int64 at;
    bool there;  // whether there is such a row; its threads go on all the same, as lanes of a warp do
    int64 live;  // how many keys come before the causal edge: what lies behind it is not read
    const unsigned char *mask;
};

__device__ inline Row row_of(const SoftmaxArguments &a) {
    Row row;
    row.at = static_cast<int64>(blockIdx.x) * blockDim.y + threadIdx.y;
    row.there = row.at < a.rows;
    row.live = row.there ? a.keys : 0;
    row.mask = static_cast<const unsigned char *>(a.mask);
    if (row.there && (MASKED || a.causal)) {
        Tiles rest = {row.at};
        const int64 query = rest.next(a.queries);
        if (a.causal) row.live = query + 1;  // there are as many keys as queries
#if MASKED
        const int64 head = rest.next(a.heads), item = rest.rest;
        row.mask += item * a.mask_strides[0] + head * a.mask_strides[1] + query * a.mask_strides[2];
#endif
    }
    return row;
}

__device__ inline Bytes mask_of(const Row &row, int64 key) {
#if MASKED
    return *reinterpret_cast<const Bytes *>(row.mask + key);
#else
    return {};
#endif
}

// Puts `instead` in the place of what is not attended to, of a vector with `left` keys before the edge.
__device__ inline void leave_out(Floats &x, int left, const Bytes &mask, float instead) {
    if (left >= WIDTH && (!MASKED || all_through(mask))) return;
    rarely();
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        if (i >= left || (MASKED && !through(mask, i))) x.at[i] = instead;
    }
}

// scale · scores, and −∞ where the row does not attend: what is there is not looked at.
__device__ inline Floats logits_of(const Vector &scores, int left, const Bytes &mask, float scale) {
    Floats t = widened(scores);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) t.at[i] *= scale;
    leave_out(t, left, mask, -infinity());
    return t;
}

// The largest logit is what exponents are taken from, unless there is none: −∞ − −∞ would be no
// number. A NaN it passes over, for that one's own exponential will be NaN.
__device__ inline float origin(float top) { return top == -infinity() ? 0.0f : top; }

__device__ inline float exponential(float t, float from) { return exp2_approximate((t - from) * LOG2_E); }

// Where no exponential is left, all probabilities are 0.
__device__ inline float inverse_of(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Where the total is NaN, so are all probabilities but those of what is not attended to.
__device__ inline Floats probabilities_of(Floats e, float inverse, const Row &row, int64 key, int left) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) e.at[i] *= inverse;
    if (inverse != inverse) {
        rarely();
        leave_out(e, left, mask_of(row, key), 0.0f);
    }
    return e;
}

// What adds to D: nothing where the probability is 0, whatever dout holds.
__device__ inline float products_of(const Vector &probabilities, const Vector &dout) {
    const Floats p = widened(probabilities), dp = widened(dout);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        if (p.at[i] != 0.0f) sum = __fmaf_rn(p.at[i], dp.at[i], sum);
    }
    return sum;
}

// scale · p (dp − D), and 0 where the probability is.
__device__ inline Floats gradients_of(const Vector &probabilities, const Vector &dout, float D,
                                      float scale) {
    const Floats p = widened(probabilities), dp = widened(dout);
    Floats ds;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        ds.at[i] = p.at[i] != 0.0f ? scale * p.at[i] * (dp.at[i] - D) : 0.0f;
    }
    return ds;
}

// What the row's threads have, merged in one order whatever turns they take; all get the same bits.
// All threads of the block must call it, each time with shared memory of its own.
template <class Merge>
__device__ inline float over_row(float mine, float (&kept)[WARPS], Merge merge) {
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        mine = merge(mine, __shfl_xor_sync(ALL_LANES, mine, distance));
    }
    if (WARPS == 1) return mine;
    if (lane() == 0) kept[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = kept[threadIdx.x % WARPS];
#pragma unroll
    for (int distance = WARPS / 2; distance > 0; distance /= 2) {
        mine = merge(mine, __shfl_xor_sync(ALL_LANES, mine, distance));
    }
    return mine;
}

__device__ inline float largest_of_row(float mine, float (&kept)[WARPS]) {
    return over_row(mine, kept, [](float a, float b) { return fmaxf(a, b); });
}

__device__ inline float sum_of_row(float mine, float (&kept)[WARPS]) {
    return over_row(mine, kept, [](float a, float b) { return a + b; });
}
