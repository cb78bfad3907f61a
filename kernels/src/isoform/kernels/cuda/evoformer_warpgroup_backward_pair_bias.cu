// Evoformer attention on the tensor cores of Hopper, backward: dpair_bias = Σ over rows s of p (dp − δ).
//
// What `evoformer_tensor_backward_pair_bias.cu` computes, with the same logits, where a logit is to cost few
// instructions. The pair bias of a team's logits stays in registers, as do their sums. What is left of a logit
// is to scale and add, shift, exponentiate, and to add p (dp − δ) to its sum.
//
// Defines: as in evoformer_warpgroup_backward_pair_bias.cuh.

#include "evoformer_warpgroup_backward_pair_bias.cuh"

using Shared = Common;
static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// All of them, as logits lie. Who takes care needs their registers for a while.
__device__ inline void widen(Sums &bias, OwnBias kept, int thread) {
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 y = kept_pair_bias(kept, thread, n, half);
            bias[n][2 * half] = anew(y.x), bias[n][2 * half + 1] = anew(y.y);
        }
}

// Weights of products, which are 0 of a dropped key, and of a query without a key.
__device__ inline void weigh(Products &x, const float (*bias)[4], float scale, float2 shift) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            x[n][e] = exponential<false>(fmaf(x[n][e], scale, bias[n][e]), 0.0f,
                                         e < 2 ? shift.x : shift.y);
}

// sum += p (dp − δ).
__device__ inline void add(float (*sum)[4], const Products &p, const Products &dp,
                           float2 minus_delta) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            sum[n][e] = fmaf(p[n][e], dp[n][e] + (e < 2 ? minus_delta.x : minus_delta.y), sum[n][e]);
}

__device__ inline void multiply(const EvoformerArguments &a, Shared &shared) {
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32), team = warp / 4;
    const int query = team % GROUPS * 64 + warp % 4 * 16, key = team / GROUPS * 64;
    const Part &place = shared.place;
    const bool strange = keep_pair_bias(shared.pair_bias, a, place.at, place.first_query + query,
                                        place.first_key + key);
    if (__any_sync(ALL_LANES, strange || no_scale(a)) && lane() == 0)
        atomicAdd(&shared.strange, 1 << warp);
    __syncwarp();
    const Named<QUERIES> first_q = named_once(shared.stage[0].q);
    const Named<KEYS> first_k = named_once(shared.stage[0].k);
    Sums sum = {}, bias;
    widen(bias, shared.pair_bias, threadIdx.x);
    Turn turn;
    for (int rows = place.rows; static_cast<int>(turn.count) < rows; ++turn.count) {
        const Stage &stage = shared.stage[turn.stage()];
        const unsigned thread = threadIdx.x + again(shared.zero), pair = query / 2 + thread % 32 / 4;
        const bool always_careful = (again(shared.strange) >> warp & 1) != 0;
        wait_for(&shared.there[turn.stage()], turn.phase());
        __syncwarp();
        // What is told of the row is read at once, needed or not: read where it is needed, it would be waited
        // for each time.
        const Kept kept = stage.keys[key / 64];
        Way way = stage.way[query / 16];
        const float2 shift = stage.shift[pair], minus_delta = stage.minus_delta[pair];
        const float *start = stage.start + key + 2 * (thread % 4);
        Starts starts;
        read(starts, start);
        if (always_careful && way == QUICKLY) way = CAREFULLY;
        if (way != TEAM_HAS_NONE && kept != NONE_KEPT) {
            const int further = turn.stage() * pieces_of<Stage>;
            const Named<QUERIES> q = after(first_q, further), cotangent = after(q, pieces_of<QueryRows>);
            const Named<KEYS> k = after(first_k, further), v = after(k, pieces_of<KeyRows>);
#pragma unroll
            for (int first = 0; first < 64; first += CHUNK) {
                Products x, dp;
                if (first > 0) read(starts, start + first);
                begin(x, starts, way == CAREFULLY);
                warpgroup_begin();
                multiply_and_mask(x, shared, stage, q, query, k, key, first, kept);
                warpgroup_commit();
                multiply_rows(dp, cotangent, query, v, key + first);
                warpgroup_commit();
                if (way == QUICKLY) {
                    warpgroup_wait<1>();
                    warpgroup_results(x);
                    weigh(x, bias + first / 8, a.scale, shift);
                    warpgroup_wait();
                    warpgroup_results(dp);
                    add(sum + first / 8, x, dp, minus_delta);
                    continue;
                }
                rarely();
                warpgroup_wait();
                warpgroup_results(x), warpgroup_results(dp);
                if (way == CAREFULLY) {
                    // What is rarely needed is computed then, and has no register all the while.
                    const int now = static_cast<int>(threadIdx.x) + again(shared.zero);
                    const Head at = {place.at.b, place.at.s + turn.count, place.at.h};
                    const int64 number =
                        number_of(a, at, place.first_query + query + now % 32 / 4);
                    add_carefully<false>(sum + first / 8, x, dp, a, number, stage,
                                         query / 2 + now % 32 / 4, key + first,
                                         shared.pair_bias + first / 16, now);
                    widen(bias, shared.pair_bias, now);
                }
            }
        }
        rows = again(place.rows);
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(&shared.done[turn.stage()]);
    }
    if (a.parts == 1 || add_up(a, place, sum))
        store(a, place.at, place.first_query + query, place.first_key + key, sum,
              (threadIdx.x + again(shared.zero)) % 32);
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_backward_pair_bias(const __grid_constant__ Given given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    begin_block(given.a, shared, WARPS_MULTIPLYING);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        copy(given, shared);
    } else {
        take_more_registers<MORE>();
        multiply(given.a, shared);
    }
}
