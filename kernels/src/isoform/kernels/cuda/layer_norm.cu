// LayerNorm, one pass over memory.
//
// A row's threads read it once, find its mean, and then its variance about that: where both are summed at
// once, a mean that is large costs the variance its digits. What is left of the mean is summed with the
// squares, and put right. Both are left for the backward, two floats a row.
//
// Defines: ELEMENT, WIDTH, ACROSS, VECTORS (see layer_norm.cuh).

#include "layer_norm.cuh"

constexpr int BUSY = 512;  // threads that there should be on a multiprocessor at least

extern "C" __global__ void __launch_bounds__(THREADS, BUSY / THREADS)
    layer_norm(const __grid_constant__ FusedArguments a) {
    __shared__ Pair sums[WARPS], squares[WARPS];
    const Place place = place_of(a);
    const float share = 1.0f / static_cast<float>(place.columns);
    Held next;
    if (place.row < a.rows) next = held(a.x, place.row, place);
    for (int64 row = place.row; row < a.rows; row += place.far) {
        const Held x = next;
        if (row + place.far < a.rows) next = held(a.x, row + place.far, place);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            const Floats wide = widened(x.at[n]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum += wide.at[i];
        }
        const float nearly = share * over_row({sum, 0.0f}, sums).first;
        Pair about = {0.0f, 0.0f};  // what is left, and the squares
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            if (!place.has(n)) continue;
            const Floats wide = widened(x.at[n]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                const float centred = wide.at[i] - nearly;
                about.first += centred;
                about.second = __fmaf_rn(centred, centred, about.second);
            }
        }
        about = over_row(about, squares);
        const float left = share * about.first, mean = nearly + left;
        const float variance = __fmaf_rn(-left, left, share * about.second);
        const float inverse = rsqrtf((variance < 0.0f ? 0.0f : variance) + a.epsilon);  // NaN stays
        if (threadIdx.x == 0) static_cast<Pair *>(a.statistics)[row] = {mean, inverse};
#pragma unroll
        for (int n = 0; n < VECTORS; ++n) {
            if (!place.has(n)) continue;
            Floats y = widened(x.at[n]);
            const Floats w = widened(load({a.weight, 0}, 0, place.at(n)));
            const Floats b = widened(load({a.bias, 0}, 0, place.at(n)));
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
                y.at[i] = __fmaf_rn((y.at[i] - nearly - left) * inverse, w.at[i], b.at[i]);
            }
            store(rounded(y), a.out, row, place.at(n));
        }
    }
}
