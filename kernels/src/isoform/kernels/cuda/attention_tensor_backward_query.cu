// Attention over a sequence on tensor cores, backward: dq.
//
// Organised like the forward: a block does a tile of queries of one head, and those tiles of keys
// stream by in which any pair attends. The softmax is not computed again but read, as lse.

#include "attention_tensor_queries.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_tensor_backward_query(const AttentionArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int thread = threadIdx.x, row = thread / 32 * OWN;

    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int query_tiles = tiles_of(a.Q, OWNED);
    const int64 first_query = (query_tiles - 1 - block.next(query_tiles)) * OWNED;
    const int64 own_query = first_query + row;
    Head at;
    at.h = block.next(a.H), at.b = block.rest;
    const Head group = group_of(a, at);
    const Sides<false> sides = {a, at.b, first_query};
    Row *own = reinterpret_cast<Row *>(&shared.stage[1]) + row;

    const auto load_tile = [&](int n, int t) { load_keys(shared, a, group, thread, n, t); };
    const auto load_own = [&](Fragments &x, const Operand &operand) {
        __syncwarp();
        load_rows<OWN, 32>(own, a, operand, at, own_query, lane(),
                           [&](int i) { return own_query + i < a.Q; });
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        load_fragments(x, own);
    };

    sides.begin_with(shared.places);
    const Scale scale(a.scale);
    Fragments q, cotangent;
    load_own(q, a.q);
    load_own(cotangent, a.dout);
    apply_sign(q, scale.sign);
    PerRow shift, delta;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64 i = own_query + 16 * m + lane() / 4 + 8 * half;
            shift[m][half] = i < a.Q ? shift_of(statistic_of(a.lse, at, i)) : infinity();
            delta[m][half] = i < a.Q ? statistic_of(a.delta, at, i) : 0.0f;
        }
    __syncthreads();
    Visits<false> visits;
    visits.start();
    int now = visits.next(sides, shared.places), next = visits.next(sides, shared.places);
#if PLACES
    write_token(shared, thread, 0, read_token(sides, thread, now));
    write_token(shared, thread, 1, read_token(sides, thread, next));
    __syncthreads();
#endif
    if (now >= 0) load_tile(0, now);
    cp_async_commit();

    Result dq = {};
    float unit = FIRST_UNIT;
    for (int n = 0; now >= 0; ++n) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the one before, or dout, has been used
        if (next >= 0) load_tile(n + 1, next);
        cp_async_commit();
        const int after = visits.next(sides, shared.places);
#if PLACES
        const Token ahead = read_token(sides, thread, after);
#endif
        const bool whole = sides.whole(shared.places, now);
        const auto &stage = shared.stage[n % 2];
#pragma unroll 1
        for (int first = 0; first < BLOCK; first += CHUNK) {
            Logits s, dp;
            multiply_over_channels(s, q, stage.k + first);
            if (!whole) {
                rarely();
                sides.hide(s, shared.places, row, now, n, first);
            }
            multiply_over_channels(dp, cotangent, stage.v + first);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int c = 0; c < CHUNK / 8; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        dp[m][c][e] =
                            exp2_approximate(fmaf(s[m][c][e], scale.c, -shift[m][e / 2])) *
                            (dp[m][c][e] - delta[m][e / 2]);
            to_units(dp, unit, dq);
            multiply_over_rows(dq, dp, stage.k + first);
        }
#if PLACES
        write_token(shared, thread, n + 2, ahead);
#endif
        now = next, next = after;
    }
    __syncthreads();  // the last tile has been used
    const float factor = ELEMENT == 1 ? a.scale * unit : a.scale;
    store_rows(
        own, dq, a, a.dq, at, own_query, a.Q, [&](int, int) { return factor; },
        [&](int m, int half) { return shift[m][half] != infinity(); });
}
