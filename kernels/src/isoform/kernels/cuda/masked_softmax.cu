// Probabilities of scores over the keys of a row, and their gradient; one pass over memory each.
//
// The threads of a row hold all of it in registers, VECTORS each: they read it once, find its maximum,
// its exponentials and their sum there, and write it once. Behind the causal edge nothing is read, and
// zeros are written at once. The backward needs no mask: where nothing is attended to the
// probability is 0, and then it looks at no gradient.
//
// Defines: ELEMENT, WIDTH, MASKED, ACROSS, VECTORS (see softmax.cuh).

#include "softmax.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    masked_softmax(const __grid_constant__ SoftmaxArguments a) {
    __shared__ float tops[WARPS], totals[WARPS];
    const Row row = row_of(a);
    const int live = static_cast<int>(row.live), keys = static_cast<int>(a.keys);
    const int first = threadIdx.x * WIDTH;
    const Matrix from = row_of(a.scores, row.at), to = row_of(a.out, row.at);
    Vector scores[VECTORS];
    Bytes mask[VECTORS];
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int key = first + n * STEP;
        if (key < live) {
            scores[n] = load(from, 0, key);
            mask[n] = mask_of(row, key);
        } else if (row.there && key < keys) {
            store(rounded(Floats{}), to, 0, key);
        }
    }
    Floats e[VECTORS];
    float top = -infinity();
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int key = first + n * STEP;
        if (key >= live) continue;
        e[n] = logits_of(scores[n], live - key, mask[n], a.scale);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) top = fmaxf(top, e[n].at[i]);
    }
    const float zero = origin(largest_of_row(top, tops));
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        if (first + n * STEP >= live) continue;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            e[n].at[i] = exponential(e[n].at[i], zero);
            total += e[n].at[i];
        }
    }
    const float inverse = inverse_of(sum_of_row(total, totals));
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int key = first + n * STEP;
        if (key >= live) continue;
        store(rounded(probabilities_of(e[n], inverse, row, key, live - key)), to, 0, key);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    masked_softmax_backward(const __grid_constant__ SoftmaxArguments a) {
    __shared__ float sums[WARPS];
    const Row row = row_of(a);
    const int live = static_cast<int>(row.live), keys = static_cast<int>(a.keys);
    const int first = threadIdx.x * WIDTH;
    const Matrix of = row_of(a.probabilities, row.at), by = row_of(a.dout, row.at);
    const Matrix to = row_of(a.out, row.at);
    Vector p[VECTORS], dout[VECTORS];
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int key = first + n * STEP;
        if (key < live) {
            p[n] = load(of, 0, key);
            dout[n] = load(by, 0, key);
        } else if (row.there && key < keys) {
            store(rounded(Floats{}), to, 0, key);
        }
    }
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        if (first + n * STEP < live) sum += products_of(p[n], dout[n]);
    }
    const float D = sum_of_row(sum, sums);
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        const int key = first + n * STEP;
        if (key < live) store(rounded(gradients_of(p[n], dout[n], D, a.scale)), to, 0, key);
    }
}
