// As masked_softmax.cu, of rows that no block can hold: they are read twice, the second time from the
// cache if they fit into that.
//
// The first reading keeps a maximum and a sum of exponentials taken from it, which is scaled when the
// maximum rises (Milakov and Gimelshein, arXiv 1805.02867).
//
// Defines: ELEMENT, WIDTH, MASKED, ACROSS, VECTORS (see softmax.cuh).

#include "softmax.cuh"

// How many of a vector's keys come before the row's edge.
__device__ inline int left_of(const Row &row, int64 key) { return clamp(row.live - key, 0, WIDTH); }

// Calls each(n, key) for the VECTORS keys that begin at `start`, but those behind the row's edge.
template <class Each>
__device__ inline void for_vectors(const Row &row, int64 start, Each each) {
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int64 key = start + n * STEP;
        if (key < row.live) each(n, key);
    }
}

__device__ inline void zeros_behind(const Row &row, const Matrix &to, int64 keys) {
    if (!row.there) return;
    const int64 passed = (row.live + WIDTH - 1) / WIDTH;  // vectors
    for (int64 key = (passed + threadIdx.x) * WIDTH; key < keys; key += STEP) {
        store(rounded(Floats{}), to, 0, key);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    masked_softmax_long(const __grid_constant__ SoftmaxArguments a) {
    __shared__ float tops[WARPS], totals[WARPS];
    const Row row = row_of(a);
    const int first = threadIdx.x * WIDTH, far = STEP * VECTORS;
    const Matrix from = row_of(a.scores, row.at), to = row_of(a.out, row.at);
    zeros_behind(row, to, a.keys);
    float top = -infinity(), total = 0.0f;
    Vector scores[VECTORS];
    Bytes mask[VECTORS];
    const auto read = [&](int n, int64 key) {
        scores[n] = load(from, 0, key);
        mask[n] = mask_of(row, key);
    };
    for (int64 start = first; start < row.live; start += far) {
        for_vectors(row, start, read);
        for_vectors(row, start, [&](int n, int64 key) {
            const Floats t = logits_of(scores[n], left_of(row, key), mask[n], a.scale);
            float higher = top;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) higher = fmaxf(higher, t.at[i]);
            total *= exponential(top, origin(higher));
            top = higher;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) total += exponential(t.at[i], origin(top));
        });
    }
    const float zero = origin(largest_of_row(top, tops));
    total = sum_of_row(total * exponential(top, zero), totals);
    const float inverse = inverse_of(total);
    for (int64 start = first; start < row.live; start += far) {
        for_vectors(row, start, read);
        for_vectors(row, start, [&](int n, int64 key) {
            Floats e = logits_of(scores[n], left_of(row, key), mask[n], a.scale);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) e.at[i] = exponential(e.at[i], zero);
            e = probabilities_of(e, inverse, row, key, left_of(row, key));
            store(rounded(e), to, 0, key);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    masked_softmax_long_backward(const __grid_constant__ SoftmaxArguments a) {
    __shared__ float sums[WARPS];
    const Row row = row_of(a);
    const int first = threadIdx.x * WIDTH, far = STEP * VECTORS;
    const Matrix of = row_of(a.probabilities, row.at), by = row_of(a.dout, row.at);
    const Matrix to = row_of(a.out, row.at);
    zeros_behind(row, to, a.keys);
    Vector p[VECTORS], dout[VECTORS];
    const auto read = [&](int n, int64 key) {
        p[n] = load(of, 0, key);
        dout[n] = load(by, 0, key);
    };
    float sum = 0.0f;
    for (int64 start = first; start < row.live; start += far) {
        for_vectors(row, start, read);
        for_vectors(row, start, [&](int n, int64) { sum += products_of(p[n], dout[n]); });
    }
    const float D = sum_of_row(sum, sums);
    for (int64 start = first; start < row.live; start += far) {
        for_vectors(row, start, read);
        for_vectors(row, start, [&](int n, int64 key) {
            store(rounded(gradients_of(p[n], dout[n], D, a.scale)), to, 0, key);
        });
    }
}
