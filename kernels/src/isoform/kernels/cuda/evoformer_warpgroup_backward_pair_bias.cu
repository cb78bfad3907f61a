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

// --- The warps that copy -------------------------------------------------------------------------

// How many rows a warp copies at once.
constexpr unsigned AT_ONCE = STAGES > 3 ? 2 : 1;

// Says that the warp's part of row `n` is there, when it is but for `pending` rows after it, and products
// find it: else those who multiply would see to that, each time.
template <int pending>
__device__ inline void tell(Shared &shared, unsigned n) {
    cp_async_wait<pending>();
    shared_for_warpgroups();
    __syncwarp();
    if (lane() == 0) arrive(&shared.there[Turn{n}.stage()]);
}

__device__ inline void tell_last(Shared &shared, unsigned rows) {
    for (unsigned n = rows < AT_ONCE ? 0 : rows - AT_ONCE; n < rows; ++n) tell<0>(shared, n);
}

// One warp copies q of all rows, and says what is told of queries; another copies ō.
template <bool cotangents>
__device__ void copy_queries(const EvoformerArguments &a, Shared &shared) {
    constexpr int WORDS = QUERIES / 32;
    const Part &place = shared.place;
    const Operand &x = cotangents ? a.dout : a.q;
    const int64 stride = x.stride[2], step = x.stride[1], told_step = a.H * a.Q;
    const int rows = uniform(place.rows), left = clamp(a.Q - place.first_query, 0, QUERIES) - lane();
    const bool none = !cotangents && no_scale(a);
    const RowCopier<32> copier(a, lane());
    const Element *from = copier.first(channels_of(x, place.at, place.first_query), stride);
    const Told *next = told_of(a, number_of(a, place.at, place.first_query)) + lane();
    Told ahead[WORDS];  // of the next row
    const auto read = [&] {
#pragma unroll
        for (int n = 0; n < WORDS; ++n)
            ahead[n] = 32 * n < left ? next[32 * n] : Told{infinity(), 0.0f};
        next += told_step;
    };
    if (rows > 0) read();
    Turn turn;
    for (int n = 0; n < rows; ++n, ++turn.count) {
        Stage &stage = shared.stage[turn.stage()];
        Told told[WORDS];
        unsigned live[WORDS], careful[WORDS];
        bool all = true;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) told[i] = ahead[i];
        if (n + 1 < rows) read();  // which has come when it is looked at
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            live[i] = __ballot_sync(ALL_LANES, !told[i].dead());
            if (!cotangents) careful[i] = __ballot_sync(ALL_LANES, told[i].careful());
            all &= live[i] == ALL_LANES;
        }
        if (turn.count >= AT_ONCE) tell<AT_ONCE - 1>(shared, turn.count - AT_ONCE);
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        if (!cotangents) say(stage, told, live, careful);
        if (none)
#pragma unroll
            for (int i = 0; i < WORDS; ++i) live[i] = 0;
        copier.copy(cotangents ? stage.cotangent : stage.q, from, stride, live,
                    all && !none && a.D == HEAD_DIM);
        cp_async_commit();
        from += step;
    }
    tell_last(shared, turn.count);
}

// One warp copies k of all rows, and says what the mask and the mask bias say of keys; another copies v.
template <bool values>
__device__ void copy_keys(const EvoformerArguments &a, Shared &shared) {
    constexpr int WORDS = KEYS / 32;
    const Part &place = shared.place;
    const Operand &x = values ? a.v : a.k;
    const int64 stride = x.stride[2], step = x.stride[1];
    const int rows = uniform(place.rows), keys = clamp(a.K - place.first_key, 0, KEYS);
    const bool masked = a.mask.data != nullptr;
    const float scale = scale_of(a), over = 1.0f / scale;
    const float dropped = scale > 0.0f ? -infinity() : infinity();
    const RowCopier<32> copier(a, lane());
    const Element *from =
        copier.first(channels_of(x, group_of(a, place.at), place.first_key), stride);
    const unsigned char *mask = static_cast<const unsigned char *>(a.mask.data) +
                                place.at.b * a.mask.stride[0] + place.at.s * a.mask.stride[1] +
                                (place.first_key + lane()) * a.mask.stride[2];
    const Element *bias = static_cast<const Element *>(a.mask_bias.data) +
                          place.at.b * a.mask_bias.stride[0] + place.at.s * a.mask_bias.stride[1] +
                          (place.first_key + lane()) * a.mask_bias.stride[4];
    unsigned char next_keep[WORDS];  // of the next row
    Element next_add[WORDS];
    const auto read = [&] {
#pragma unroll
        for (int n = 0; n < WORDS; ++n) {
            const bool present = 32 * n + lane() < keys;
            next_keep[n] = present;
            if (masked && present) next_keep[n] = mask[32 * n * a.mask.stride[2]];
            round_to(0.0f, next_add + n);
            if (MASK_BIAS && present) next_add[n] = bias[32 * n * a.mask_bias.stride[4]];
        }
        if (masked) mask += a.mask.stride[1];
        if (MASK_BIAS) bias += a.mask_bias.stride[1];
    };
    if (rows > 0) read();
    Turn turn;
    for (int n = 0; n < rows; ++n, ++turn.count) {
        Stage &stage = shared.stage[turn.stage()];
        unsigned char keep[WORDS];
        Element add[WORDS];
        unsigned kept[WORDS], unlike[WORDS];
        bool all = true;
#pragma unroll
        for (int i = 0; i < WORDS; ++i) keep[i] = next_keep[i], add[i] = next_add[i];
        if (n + 1 < rows) read();
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const bool there = keep[i] != 0, present = 32 * i + lane() < keys;
            kept[i] = __ballot_sync(ALL_LANES, there);
            unlike[i] = __ballot_sync(
                ALL_LANES, present && !(there && (!MASK_BIAS || to_float(add[i]) == 0.0f)));
            all &= kept[i] == ALL_LANES;
        }
        if (turn.count >= AT_ONCE) tell<AT_ONCE - 1>(shared, turn.count - AT_ONCE);
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        // what is beyond the keys may begin with anything
        if (!values) say(stage, 0, keep, add, kept, unlike, over, dropped);
        copier.copy(values ? stage.v : stage.k, from, stride, kept, all && a.D == HEAD_DIM);
        cp_async_commit();
        from += step;
    }
    tell_last(shared, turn.count);
}

// --- The warps that multiply ---------------------------------------------------------------------

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
                multiply_rows(x, q, query, k, key + first, kept == SOME_KEPT);
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
    evoformer_warpgroup_backward_pair_bias(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);

    if (threadIdx.x == 0) {
        shared.place = place_of(a);
        shared.zero = shared.strange = 0;
        for (int i = 0; i < STAGES; ++i) {
            expect(&shared.there[i], COPYING / 32), expect(&shared.done[i], WARPS_MULTIPLYING);
        }
    }
    __syncthreads();

    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        const int warp = copier() / 32;
        if (warp == 0)
            copy_queries<false>(a, shared);
        else if (warp == 1)
            copy_queries<true>(a, shared);
        else if (warp == 2)
            copy_keys<false>(a, shared);
        else
            copy_keys<true>(a, shared);
    } else {
        take_more_registers<MORE>();
        multiply(a, shared);
    }
}
