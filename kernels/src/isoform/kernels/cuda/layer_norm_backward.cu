// The gradients of LayerNorm, one pass over memory.
//
// Two sums over a row of x and dout give dx. While the threads pass from row to row, each sums its own
// channels of the gradients of weight and bias, in registers; what blocks have summed is added by
// column_sums.cu.
//
// Defines: ELEMENT, WIDTH, ACROSS, VECTORS (see layer_norm.cuh).

#include "layer_norm.cuh"

// What a block's threads have summed of their channels, to its row of `parts`.
__device__ inline void leave_sums(const FusedArguments &a, const Place &place, Floats (&sums)[VECTORS],
                                  float *parts) {
    __shared__ float kept[ROWS][ACROSS * WIDTH];
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        if (ROWS > 1) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                kept[threadIdx.y][threadIdx.x * WIDTH + i] = sums[n].at[i];
            }
            __syncthreads();
            if (threadIdx.y == 0) {
#pragma unroll
                for (int y = 1; y < ROWS; ++y) {
                    for (int i = 0; i < WIDTH; ++i) sums[n].at[i] += kept[y][threadIdx.x * WIDTH + i];
                }
            }
        }
        if (threadIdx.y == 0 && place.has(n)) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) parts[place.at(n) + i] = sums[n].at[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_backward(const __grid_constant__ FusedArguments a) {
    __shared__ Pair kept[2][WARPS];  // in turns
    const Place place = place_of(a);
    const float share = 1.0f / static_cast<float>(place.columns);
    const Pair *const statistics = static_cast<const Pair *>(a.statistics);
    Floats of_weight[VECTORS] = {}, of_bias[VECTORS] = {};
    Held next_x, next_dout;
    Pair next_of_row;
    const auto read = [&](int64 row) {
        next_x = held(a.x, row, place), next_dout = held(a.dout, row, place);
        next_of_row = statistics[row];
    };
    if (place.row < a.rows) read(place.row);
    int turn = 0;
    for (int64 row = place.row; row < a.rows; row += place.far, turn ^= 1) {
        const Held x = next_x, dout = next_dout;
        const float mean = next_of_row.first, inverse = next_of_row.second;
        if (row + place.far < a.rows) read(row + place.far);
        const Held weight = held({a.weight, 0}, 0, place);
        Floats n_of[VECTORS], g[VECTORS];
        Pair sums = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            n_of[n] = widened(x.at[n]), g[n] = widened(weight.at[n]);
            const Floats dy = widened(dout.at[n]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                n_of[n].at[i] = (n_of[n].at[i] - mean) * inverse;
                of_weight[n].at[i] = __fmaf_rn(dy.at[i], n_of[n].at[i], of_weight[n].at[i]);
                of_bias[n].at[i] += dy.at[i];
                g[n].at[i] *= dy.at[i];
                sums.first += g[n].at[i];
                sums.second = __fmaf_rn(g[n].at[i], n_of[n].at[i], sums.second);
            }
        }
        sums = over_row(sums, kept[turn]);
        const float along_one = share * sums.first, along_n = share * sums.second;
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            if (!place.has(n)) continue;
            Floats dx;
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float rest = __fmaf_rn(-along_n, n_of[n].at[i], g[n].at[i] - along_one);
                dx.at[i] = rest * inverse;
            }
            store(rounded(dx), a.out, row, place.at(n));
        }
    }
    float *const parts = static_cast<float *>(a.parts) + blockIdx.x * (2 * a.columns);
    leave_sums(a, place, of_bias, parts);
    leave_sums(a, place, of_weight, parts + a.columns);
}
