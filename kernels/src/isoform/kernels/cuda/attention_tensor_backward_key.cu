// Attention over a sequence on tensor cores, backward: dk and dv.
//
// A block does a tile of keys of one key/value head; of the queries of all heads of the group, one head
// after the other, those tiles stream by in which any pair attends. Here the rows of the products are
// keys: of Sᵀ = K Qᵀ, a warp holds some keys and all queries of a tile, so that Pᵀ and dSᵀ are left
// operands of the sums over queries.
//
// Defines: as in attention_tensor.cuh; BLOCK is of queries.

#include "attention_tensor.cuh"

constexpr bool RELOAD = HEAD_DIM > 64;  // k and v from shared memory each time, for want of registers

// What the backward must know of a query besides q and dout.
struct alignas(8) Query {
    float shift, delta;
};

struct Shared {
    Row k[OWNED], v[OWNED];
    struct {
        Row q[BLOCK], cotangent[BLOCK];
    } stage[2];
    Query queries[4][BLOCK];  // of four tiles on end
    Places places;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// Logits s become weights p, and dp the logits' gradients p (dp − δ).
__device__ void differentiate(Logits &s, Logits &dp, const Query *queries, float c) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
        const float4 two =
            *reinterpret_cast<const float4 *>(&queries[8 * n + 2 * (lane() % 4)]);
        const Query query[2] = {{two.x, two.y}, {two.z, two.w}};
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[m][n][e] = exp2_approximate(fmaf(s[m][n][e], c, -query[e % 2].shift));
                dp[m][n][e] = s[m][n][e] * (dp[m][n][e] - query[e % 2].delta);
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_tensor_backward_key(const AttentionArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int thread = threadIdx.x, row = thread / 32 * OWN;

    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first_key = block.next(tiles_of(a.K, OWNED)) * OWNED, own_key = first_key + row;
    Head group;  // h is the key/value head here
    group.h = block.next(a.G), group.b = block.rest;
    const Sides<true> sides = {a, group.b, first_key};
    const int heads = static_cast<int>(a.H / a.G);
    Row *own_k = shared.k + row, *own_v = shared.v + row;

    // A tile of queries of one head of the group.
    struct Step {
        int head, tile;
    };
    const auto head_of = [&](const Step &step) { return Head{group.b, group.h * heads + step.head}; };
    Visits<true> visits;
    visits.start();
    int head = 0;
    const auto next_step = [&] {
        int tile = visits.next(sides, shared.places);
        while (tile < 0 && ++head < heads) {
            visits.start();
            tile = visits.next(sides, shared.places);
            if (tile < 0) head = heads;  // no head has any
        }
        return Step{head, tile};
    };
    const auto load_tile = [&](int n, const Step &step) {
        const int64 first = static_cast<int64>(step.tile) * BLOCK;
        const Head at = head_of(step);
        const Query *queries = shared.queries[n % 4];
        const auto wanted = [&](int i) { return queries[i].shift != infinity(); };
        load_rows<BLOCK, THREADS>(shared.stage[n % 2].q, a, a.q, at, first, thread, wanted);
        load_rows<BLOCK, THREADS>(shared.stage[n % 2].cotangent, a, a.dout, at, first, thread,
                                  wanted);
    };

    // What is needed of a query of a tile, as it came, so that nobody waits for it too early.
    struct Ahead {
        float lse, delta;
#if PLACES
        Token token;
#endif
    };
    const auto read_query = [&](const Step &step) {
        const int64 i =
            step.tile < 0 || thread >= BLOCK ? -1 : static_cast<int64>(step.tile) * BLOCK + thread;
        Ahead ahead;
        ahead.lse = -infinity(), ahead.delta = 0.0f;
        if (i >= 0 && i < a.Q) {
            ahead.lse = statistic_of(a.lse, head_of(step), i);
            ahead.delta = statistic_of(a.delta, head_of(step), i);
        }
#if PLACES
        ahead.token = sides.streamed().token(i);
#endif
        return ahead;
    };
    const auto write_query = [&](int n, const Ahead &ahead) {
        if (thread >= BLOCK) return;
        const float shift = shift_of(ahead.lse);
        shared.queries[n % 4][thread] = {shift, shift == infinity() ? 0.0f : ahead.delta};
#if PLACES
        shared.places.streamed[n % 4][thread] = ahead.token;
#endif
    };

    sides.begin_with(shared.places);
    const auto real = [&](int j) { return sides.own().real(own_key + j); };
    load_rows<OWN, 32>(own_k, a, a.k, group, own_key, lane(), real);
    load_rows<OWN, 32>(own_v, a, a.v, group, own_key, lane(), real);
    cp_async_commit();
    __syncthreads();
    Step now = next_step(), next = next_step();
    write_query(0, read_query(now));
    write_query(1, read_query(next));
    __syncthreads();
    if (now.tile >= 0) load_tile(0, now);
    cp_async_commit();

    const Scale scale(a.scale);
    cp_async_wait<1>();
    __syncwarp();
    Fragments k, v;  // unless these are too many registers
    load_fragments(k, own_k);
    apply_sign(k, scale.sign);
    if constexpr (RELOAD) {
        if (scale.sign != 1.0f) {  // then it is k in shared memory that is used
            __syncwarp();
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
#pragma unroll
                    for (int part = 0; part < 4; ++part)
                        *reinterpret_cast<unsigned *>(
                            own_k[16 * m + lane() / 4 + 8 * (part % 2)] + 16 * step +
                            2 * (lane() % 4) + 8 * (part / 2)) = k[m][step][part];
            __syncwarp();
        }
    } else
        load_fragments(v, own_v);

    Result dk = {}, dv = {};
    float unit = FIRST_UNIT;
    for (int n = 0; now.tile >= 0; ++n) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the one before has been used
        if (next.tile >= 0) load_tile(n + 1, next);
        cp_async_commit();
        const Step after = next_step();
        const Ahead ahead = read_query(after);
        const bool whole = sides.whole(shared.places, now.tile);
        const auto &stage = shared.stage[n % 2];
#pragma unroll 1
        for (int first = 0; first < BLOCK; first += CHUNK) {
            Logits s, dp;
            if constexpr (RELOAD)
                multiply_over_channels(s, own_k, stage.q + first);
            else
                multiply_over_channels(s, k, stage.q + first);
            if (!whole) {
                rarely();
                sides.hide(s, shared.places, row, now.tile, n, first);
            }
            if constexpr (RELOAD)
                multiply_over_channels(dp, own_v, stage.cotangent + first);
            else
                multiply_over_channels(dp, v, stage.cotangent + first);
            differentiate(s, dp, shared.queries[n % 4] + first, scale.c);
            multiply_over_rows(dv, s, stage.cotangent + first);
            to_units(dp, unit, dk);
            multiply_over_rows(dk, dp, stage.q + first);
        }
        write_query(n + 2, ahead);
        now = next, next = after;
    }
    cp_async_wait<0>();

    const auto alive = [&](int m, int half) { return real(16 * m + lane() / 4 + 8 * half); };
    if (a.dk.data != nullptr) {
        const float factor = ELEMENT == 1 ? a.scale * unit : a.scale;
        store_rows(
            own_k, dk, a, a.dk, group, own_key, a.K, [&](int, int) { return factor; }, alive);
    }
    if (a.dv.data != nullptr)
        store_rows(
            own_v, dv, a, a.dv, group, own_key, a.K, [](int, int) { return 1.0f; }, alive);
}
