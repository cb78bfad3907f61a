// Evoformer attention, backward on Hopper: what all its kernels want to know of a query, first of all.
// δ = Σ_d ō_d out_d, and its softmax as they need it.
//
// Some lanes read a query together, a head's after the next: their rows of channels are neighbours. A warp
// reads 32 of them, and only then each lane finishes one.
//
// Defines: as in evoformer_warpgroup.cuh. Rows of ō and out are read 16 bytes at a time.

#include "evoformer_warpgroup_backward.cuh"

constexpr int PIECES = HEAD_DIM / 8;                          // of 16 bytes, in a row
constexpr int LANES = PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : 8;  // that read a query
constexpr int AT_ONCE = 32 / LANES;                           // queries that a warp reads at once
constexpr int THREADS = 256;                                  // of a block, and as many queries
static_assert(PIECES <= LANES && ALIGNED && !GATED, "this is all that the kernel does");

// The lane's sum over those that read a query together, of the query among theirs that has its number.
__device__ inline float own_sum(float (&parts)[LANES]) {
#pragma unroll
    for (int half = LANES / 2; half > 0; half /= 2) {
        const bool upper = (lane() & half) != 0;
#pragma unroll
        for (int n = 0; n < half; ++n) {
            const float kept = upper ? parts[n + half] : parts[n];
            const float given = upper ? parts[n] : parts[n + half];
            parts[n] = kept + __shfl_xor_sync(ALL_LANES, given, half);
        }
    }
    return parts[0];
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    evoformer_warpgroup_backward_queries(const EvoformerArguments a) {
    const int thread = static_cast<int>(threadIdx.x);
    if (a.turns != nullptr)  // backward_pair_bias will count there
        for (int64 i = int64{blockIdx.x} * THREADS + thread; i <= a.pair_bias_tiles;
             i += int64{gridDim.x} * THREADS)
            a.turns[i] = 0;

    // A block does queries of one row s, numbered head by head.
    const unsigned heads = static_cast<unsigned>(a.H), queries = static_cast<unsigned>(a.Q) * heads;
    Blocks block = {blockIdx.x};
    const unsigned first = static_cast<unsigned>(block.next(tiles_of(queries, THREADS))) * THREADS +
                           thread / 32 * 32;
    Head at = {};
    at.s = block.next(a.S), at.b = block.rest;
    if (first >= queries) return;

    // The lane's own, or the last one again, so that all that is read is there.
    const unsigned own = first + lane() % LANES * AT_ONCE + lane() / LANES;
    const unsigned query = own < queries ? own : queries - 1, i = query / heads, h = query % heads;
    const int64 number = number_of(a, at, 0) + (h * static_cast<unsigned>(a.Q) + i);
    const KeptSoftmax softmax = kept_softmax(a, number);

    // A lane beyond the channels reads the first ones once more: no lane goes a way of its own.
    const bool there = lane() % LANES * 8 < a.D;
    const int channel = there ? lane() % LANES * 8 : 0;
    const Element *dout = channels_of(a.dout, at, 0) + channel;
    const Element *out = channels_of(a.out, at, 0) + channel;
    const int64 own_dout = i * a.dout.stride[2] + h * a.dout.stride[3];
    const int64 own_out = i * a.out.stride[2] + h * a.out.stride[3];
    float parts[LANES];
#pragma unroll
    for (int n = 0; n < LANES; ++n) {
        const int64 dout_from = __shfl_sync(ALL_LANES, own_dout, n, LANES);
        const int64 out_from = __shfl_sync(ALL_LANES, own_out, n, LANES);
        const float sum = dot(*reinterpret_cast<const uint4 *>(dout + dout_from),
                              *reinterpret_cast<const uint4 *>(out + out_from));
        parts[n] = there ? sum : 0.0f;
    }
    const float delta = own_sum(parts);

    // without a branch, so that top and total are read with the rows and not after them
    const float total = softmax.total();
    const float shift = finished(softmax.top, total, 0.0f).shift + log2f(total);
    const bool dead = total == 0.0f;
    const Told told = {dead ? infinity() : shift, dead ? 0.0f : -delta};
    if (own < queries) *told_of(a, number) = told;
}
