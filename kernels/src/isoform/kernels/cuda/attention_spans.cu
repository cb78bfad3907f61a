// The tables of attention_mask.cuh: what every 64 queries, and every 64 keys, have in common.
//
// A block makes one group of 32 spans of one example: a warp a span at a time, then the first warp
// what holds of all. Groups of queries come first, then those of keys.

#define ELEMENT 0
#include "attention_mask.cuh"

constexpr int WARPS = 8;

__device__ int64 other(int64 x, int distance) {
    const long long there = __shfl_xor_sync(ALL_LANES, static_cast<long long>(x), distance);
    return static_cast<int64>(there);
}

// What holds of the spans of all lanes together.
__device__ Span over_warp(Span span) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        span = together(span, {other(span.low, distance), other(span.high, distance),
                               other(span.first, distance), other(span.last, distance),
                               other(span.whole, distance)});
    return span;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attention_spans(const AttentionArguments a) {
    __shared__ Span spans[GROUP];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64 query_groups = groups_of(a.Q), key_groups = groups_of(a.K);
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 group = block.next(query_groups + key_groups), b = block.rest;
    const bool of_keys = group >= query_groups;
    const Sequence sequence = of_keys ? keys_of(a, b) : queries_of(a, b);
    const int64 own = of_keys ? group - query_groups : group;
    const int64 groups = of_keys ? key_groups : query_groups;
    Span *table = const_cast<Span *>(sequence.spans);

    for (int n = warp; n < GROUP; n += WARPS) {
        const int64 first = (own * GROUP + n) * SPAN + lane;
        const Span span = over_warp(
            together(span_of(sequence.token(first)), span_of(sequence.token(first + 32))));
        if (lane == 0) spans[n] = table[own * GROUP + n] = span;
    }
    __syncthreads();
    if (warp > 0) return;
    const Span whole = over_warp(spans[lane]);
    if (lane == 0) table[groups * GROUP + own] = whole;
}
