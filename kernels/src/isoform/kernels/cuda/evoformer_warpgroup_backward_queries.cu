// Evoformer attention, backward on Hopper: what all its kernels want to know of a query, first of all.
// δ = Σ_d ō_d out_d, and its softmax as they need it.
//
// Eight lanes do a query, a head's after the next: their rows of channels are neighbours.
//
// Defines: as in evoformer_warpgroup.cuh. Rows of ō and out are read 16 bytes at a time.

#include "evoformer_warpgroup_backward.cuh"

constexpr int LANES = 8;  // of a query
static_assert(HEAD_DIM <= 8 * LANES && ALIGNED && !GATED, "this is all that the kernel does");

extern "C" __global__ void __launch_bounds__(256)
    evoformer_warpgroup_backward_queries(const EvoformerArguments a) {
    const int64 thread = static_cast<int64>(blockIdx.x) * 256 + threadIdx.x, n = thread / LANES;
    if (a.turns != nullptr)  // backward_pair_bias will count there
        for (int64 i = thread; i <= a.pair_bias_tiles; i += int64{gridDim.x} * 256) a.turns[i] = 0;
    Tiles place = {n};
    Head at;
    at.h = place.next(a.H);
    const int64 i = place.next(a.Q);
    at.s = place.next(a.S), at.b = place.rest;
    const bool present = at.b < a.B;
    const int channel = threadIdx.x % LANES * 8;

    float delta = 0.0f;
    if (present && channel < a.D)
        delta = dot(*reinterpret_cast<const uint4 *>(channels_of(a.dout, at, i) + channel),
                    *reinterpret_cast<const uint4 *>(channels_of(a.out, at, i) + channel));
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2)
        delta += __shfl_xor_sync(ALL_LANES, delta, distance);
    if (!present || threadIdx.x % LANES != 0) return;

    const int64 number = number_of(a, at, i);
    const KeptSoftmax softmax = kept_softmax(a, number);
    const float total = softmax.total();
    *told_of(a, number) = total == 0.0f
                              ? Told{infinity(), 0.0f}
                              : Told{finished(softmax.top, total, 0.0f).shift + log2f(total), -delta};
}
