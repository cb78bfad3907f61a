// δ_i = Σ_d dout_id out_id, which the backward of attention needs of every query (rule SEQ-8): a warp
// for each query of each head. Of a query without a key it is 0, whatever dout holds (rule SEQ-5).

#include "attention_mask.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attention_delta(const AttentionArguments a) {
    const int lane = threadIdx.x % 32;
    Tiles row = {static_cast<int64>(blockIdx.x) * WARPS + threadIdx.x / 32};
    if (row.rest >= a.B * a.Q * a.H) return;
    Head at;
    at.h = row.next(a.H);
    const int64 i = row.next(a.Q);
    at.b = row.rest;

    const Element *dout = channels_of(a.dout, at, i), *out = channels_of(a.out, at, i);
    float sum = 0.0f;
    for (int64 d = lane; d < a.D; d += 32)
        sum += to_float(dout[d * a.dout.stride[3]]) * to_float(out[d * a.out.stride[3]]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    if (lane == 0)
        statistic_of(a.delta, at, i) = statistic_of(a.lse, at, i) == -infinity() ? 0.0f : sum;
}
