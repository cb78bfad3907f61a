// Evoformer attention on the tensor cores of Hopper, backward: dpair_bias = Σ over rows s of p (dp − δ), and
// dq = Σ over keys of p (dp − δ) k.
//
// What `evoformer_warpgroup_backward_query.cu` and `_pair_bias.cu` compute, with logits that are computed once,
// where a block has all keys. Its teams do 64 × 64 logits of a row each, as for the pair bias. They round the
// gradients of a row's logits and leave them in shared memory; and one team multiplies them by k, while the
// others go on with the next rows: a team its row after those of the others.
//
// Gradients of logits are bfloat16: float16 would take a unit of each team (rule EVO-7).
//
// Defines: as in evoformer_warpgroup_backward_pair_bias.cuh.

#include "evoformer_warpgroup_backward_pair_bias.cuh"

static_assert(ELEMENT == 2, "gradients of logits have the range of float");

constexpr int ROUNDED = 2;  // rows whose gradients of logits there is room for
using RoundedTurn = InTurn<ROUNDED>;

// A row's gradients, rounded, in columns of pieces of eight keys.
struct Gradients {
    uint4 piece[KEYS / 8][QUERIES];

    static constexpr unsigned PIECE_STEP = 16 * QUERIES;
};

// Those of two rows; and who has written them, who has read them.
struct Rounded {
    Gradients gradients[ROUNDED];
    Signal there[ROUNDED], done[ROUNDED];
};

struct Shared : Common {
    Rounded rounded;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// Weights of products, which are 0 of a dropped key, and of a query without a key: `bias` is that of sixteen
// keys, as it came.
__device__ inline void weigh(Products &x, const uint4 (&bias)[CHUNK / 16], float scale, float2 shift) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 &four = bias[n / 2];
            const float2 y = unpack(n % 2 == 0 ? half == 0 ? four.x : four.y : half == 0 ? four.z : four.w);
            float *one = &x[n][2 * half];
            const float at = half == 0 ? shift.x : shift.y;
            one[0] = exponential<false>(fmaf(one[0], scale, y.x), 0.0f, at);
            one[1] = exponential<false>(fmaf(one[1], scale, y.y), 0.0f, at);
        }
}

// dp becomes p (dp − δ), and the sum has that added.
__device__ inline void add(float (*sum)[4], const Products &p, Products &dp, float2 minus_delta) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            dp[n][e] = p[n][e] * (dp[n][e] + (e < 2 ? minus_delta.x : minus_delta.y));
            sum[n][e] += dp[n][e];
        }
}

// Leaves the gradients of a chunk's logits for all, rounded: of sixteen queries from `query` on, and of keys
// from `key` on, both of the block.
__device__ inline void leave(Rounded &rounded, int stage, const Products &ds, int query, int key) {
    auto &gradients = rounded.gradients[stage];
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n += 2) {
        unsigned pairs[4];  // queries, queries + 8; then the next eight keys
#pragma unroll
        for (int i = 0; i < 4; ++i)
            pairs[i] = pack(ds[n + i / 2][i % 2 * 2], ds[n + i / 2][i % 2 * 2 + 1]);
#ifdef ISOFORM_WARPGROUPS
        stmatrix_x4(&gradients.piece[key / 8 + n + lane() / 16][query + lane() % 16], pairs);
#else
#pragma unroll
        for (int i = 0; i < 4; ++i)
            reinterpret_cast<unsigned *>(
                &gradients.piece[key / 8 + n + i / 2][query + lane() / 4 + i % 2 * 8])[lane() % 4] =
                pairs[i];
#endif
    }
}

// dq of row `n` of those of the block, for the warp's sixteen queries of the block, from `query` on.
__device__ inline void finish_row(const EvoformerArguments &a, Shared &shared, unsigned n, int query) {
    Rounded &rounded = shared.rounded;
    const RoundedTurn turn = {n};
    const Stage &stage = shared.stage[Turn{n}.stage()];
    const auto &gradients = rounded.gradients[turn.stage()];
    const Part &place = shared.place;
    const Head at = {place.at.b, place.at.s + n, place.at.h};
    const int64 first = place.first_query + query + lane() / 4;
    wait_for(&rounded.there[turn.stage()], turn.phase());
    __syncwarp();
    float dq[CHANNEL_TILES][4];
#pragma unroll
    for (int i = 0; i < CHANNEL_TILES; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[i][e] = 0.0f;
#ifdef ISOFORM_WARPGROUPS
    const TileName left = by_rows(shared_address(&gradients.piece[0][query / 64 * 64]), gradients.PIECE_STEP);
    const TileName right = named(stage.k).name;
    warpgroup_begin();
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i)
        warpgroup_multiply_columns(dq, left.at(i * 2 * gradients.PIECE_STEP), right.at(32 * 16 * i));
    warpgroup_commit();
    warpgroup_wait();
    warpgroup_results(dq);
#else
    for (int i = 0; i < KEYS / 16; ++i) {
        unsigned left[1][4];
        ldmatrix_x4(left[0], &gradients.piece[2 * i + lane() / 16][query + lane() % 16]);
        multiply_columns(dq, left, stage.k, 16 * i);
    }
#endif
    const float2 shift = stage.shift[query / 2 + lane() / 4];
    __syncwarp();
    if (lane() == 0) {
        arrive(&rounded.done[turn.stage()]);
        arrive(&shared.done[Turn{n}.stage()]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64 i = first + 8 * half;
        if (i >= a.Q) continue;
        const bool alive = (half == 0 ? shift.x : shift.y) != infinity();
        store_row(a, a.dq, channels_of(a.dq, at, i), in_pairs(a.dq), [&](int c, int e) {
            return alive ? dq[c][2 * half + e] * a.scale : 0.0f;
        });
    }
}

__device__ inline void multiply(const EvoformerArguments &a, Shared &shared) {
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32), team = warp / 4;
    const int query = team % GROUPS * 64 + warp % 4 * 16, across = team / GROUPS, key = across * 64;
    const Part &place = shared.place;
    const bool strange = keep_pair_bias(shared.pair_bias, a, place.at, place.first_query + query,
                                        place.first_key + key);
    if (__any_sync(ALL_LANES, strange || no_scale(a)) && lane() == 0)
        atomicAdd(&shared.strange, 1 << warp);
    __syncwarp();
    Sums sum = {};
    Turn turn;
    // Two rows more than there are: the gradients of the row before the last one are there by now.
    for (int rows = place.rows;; ++turn.count) {
        if (turn.count >= 2 && (turn.count - 2) % ACROSS == across)
            finish_row(a, shared, turn.count - 2, query);
        if (static_cast<int>(turn.count) > rows) break;
        if (static_cast<int>(turn.count) == rows) continue;
        const Stage &stage = shared.stage[uniform(turn.stage())];
        const RoundedTurn rounded = {turn.count};
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
        const auto leave_chunk = [&](const Products &ds, int first) {
            if (first == 0) {
                wait_for(&shared.rounded.done[rounded.stage()], 1 - rounded.phase());
                __syncwarp();
            }
            leave(shared.rounded, rounded.stage(), ds, query, key + first);
        };
        const Products nothing = {};
        if (way != TEAM_HAS_NONE && kept != NONE_KEPT) {
            const Named<QUERIES> q = named(stage.q), cotangent = named(stage.cotangent);
            const Named<KEYS> k = named(stage.k), v = named(stage.v);
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
                    uint4 bias[CHUNK / 16];
#pragma unroll
                    for (int i = 0; i < CHUNK / 16; ++i)
                        bias[i] = shared.pair_bias[first / 16 + i][thread];
                    warpgroup_wait<1>();
                    warpgroup_results(x);
                    weigh(x, bias, a.scale, shift);
                    warpgroup_wait();
                    warpgroup_results(dp);
                    add(sum + first / 8, x, dp, minus_delta);
                    leave_chunk(dp, first);
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
                    add_carefully<true>(sum + first / 8, x, dp, a, number, stage,
                                        query / 2 + now % 32 / 4, key + first,
                                        shared.pair_bias + first / 16, now);
                    leave_chunk(dp, first);
                } else
                    leave_chunk(nothing, first);
            }
        } else
#pragma unroll
            for (int first = 0; first < 64; first += CHUNK) leave_chunk(nothing, first);
        rows = again(place.rows);
        shared_for_warpgroups();
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            arrive(&shared.rounded.there[rounded.stage()]);
            arrive(&shared.done[turn.stage()]);
        }
    }
    if (a.parts == 1 || add_up(a, place, sum))
        store(a, place.at, place.first_query + query, place.first_key + key, sum,
              (threadIdx.x + again(shared.zero)) % 32);
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_backward_query_pair(const __grid_constant__ Given given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    begin_block(given.a, shared, WARPS_MULTIPLYING + 4 * GROUPS);  // those who finish the row once more
    if (threadIdx.x == 0)
        for (int i = 0; i < ROUNDED; ++i) {
            expect(&shared.rounded.there[i], WARPS_MULTIPLYING);
            expect(&shared.rounded.done[i], 4 * GROUPS);
        }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        copy(given, shared);
    } else {
        take_more_registers<MORE>();
        multiply(given.a, shared);
    }
}
