// Evoformer attention on tensor cores, backward: dpair_bias.
//
// A block owns a tile of queries × keys of one head and keeps its gradient in registers while the rows
// s stream by, all of them or a part: where the tiles alone do not fill the GPU, a.parts blocks share
// the rows of a tile. Their sums are added up in memory, one after the other, each block waiting for
// its turn, so that equal calls give equal bits. A block's number is drawn when it starts: those before
// it have started too, and none waits for one that cannot run.
//
// Defines: as in evoformer_tensor.cuh; BLOCK is of keys; GATED: whether there is a gate.

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int QUERIES = WARPS * OWN;

struct Stage {
    Row q[QUERIES], cotangent[QUERIES];
#if GATED
    Row gate[QUERIES];
#endif
    Row k[BLOCK], v[BLOCK];
};

struct Shared {
    Stage stage[2];
    BiasRow pair_bias[QUERIES];
    Query queries[4][QUERIES];
    Keys keys[4];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");
static_assert(BLOCK <= THREADS && QUERIES <= 2 * THREADS, "a thread looks after one key, two queries");

using Sums = float[M_TILES][BLOCK / 8][4];

// sum += p (dp − δ), of which dp (1 / total) − δ / total is one instruction. Nothing where the query
// has no key, or the key is dropped: beside NaN a factor of 0 would not do.
template <bool CAREFUL>
__device__ void add(Sums &sum, int first, const float (&s)[M_TILES][CHUNK / 8][4],
                    const float (&dp)[M_TILES][CHUNK / 8][4], const Query (&query)[M_TILES][2],
                    const unsigned short *kept) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const Query &at = query[m][e / 2];
            const float minus = -at.delta * at.inverse;
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float p = exponential<CAREFUL>(s[m][n][e], at.top, at.shift);
                const float x = fmaf(dp[m][n][e], at.inverse, minus);
                if (CAREFUL && (at.inverse == 0.0f || kept[8 * n + 2 * (lane() % 4) + e % 2] == 0))
                    continue;
                float &place = sum[m][first / 8 + n][e];
                place = fmaf(p, x, place);
            }
        }
}

// Adds one row s.
template <bool CAREFUL>
__device__ void add_row(Sums &sum, const Fragments &q, const Fragments &cotangent, const Tile &tile,
                        const Row *v, const Query (&query)[M_TILES][2], float scale) {
#pragma unroll
    for (int first = 0; first < BLOCK; first += CHUNK) {
        // Besides what it saves: a branch here keeps the compiler from having all chunks in registers.
        if (!__any_sync(ALL_LANES, tile.keys.kept[first + lane() % CHUNK] != 0)) continue;
        float s[M_TILES][CHUNK / 8][4], dp[M_TILES][CHUNK / 8][4] = {};
        logits<CAREFUL>(s, q, tile, first, scale);
        multiply_over_channels(dp, cotangent, v + first);
        add<CAREFUL>(sum, first, s, dp, query, tile.keys.kept + first);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    evoformer_tensor_backward_pair_bias(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    __shared__ int number;
    const int thread = threadIdx.x, w = threadIdx.x / 32;

    Blocks block = {blockIdx.x};
    if (a.parts > 1) {
        if (thread == 0) number = atomicAdd(a.turns + a.pair_bias_tiles, 1);
        __syncthreads();
        block.rest = number;
    }
    const int64 first_key = block.next(tiles_of(a.K, BLOCK)) * BLOCK;
    const int64 first_query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES;
    Head at;
    at.h = block.next(a.H), at.b = block.next(a.B);
    const int64 part = block.rest;
    const int64 begin = a.S * part / a.parts;
    const int64 end = a.S * (part + 1) / a.parts;

    const auto head_of = [&](int64 s) { return Head{at.b, s, at.h}; };
    const auto read_ahead = [&](int64 s, KeyStream::Raw &key, RawQuery (&queries)[2]) {
        const bool there = s < end;
        if (thread < BLOCK) key = read_raw_key(a, head_of(s), there, first_key + thread);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            if (thread + n * THREADS < QUERIES)
                queries[n] = read_query(a, head_of(s), there, first_query + thread + n * THREADS);
    };
    const auto write_ahead = [&](int64 s, const KeyStream::Raw &key, const RawQuery (&queries)[2]) {
        if (thread < BLOCK) write_key(shared.keys[s % 4], thread, key);
#pragma unroll
        for (int n = 0; n < 2; ++n)
            if (thread + n * THREADS < QUERIES)
                shared.queries[s % 4][thread + n * THREADS] = finished(queries[n]);
    };
    // Addresses are computed anew for each row: kept, they would take too many registers.
    const auto queries_of = [&](const Operand &x, int64 s) {
        return RowStream<QUERIES, THREADS>(a, x, head_of(s), first_query, thread);
    };
    const auto keys_of = [&](const Operand &x, int64 s) {
        return RowStream<BLOCK, THREADS>(a, x, group_of(a, head_of(s)), first_key, thread);
    };
    const auto load_row = [&](int64 s) {
        Stage &stage = shared.stage[s % 2];
        const unsigned short *kept = shared.keys[s % 4].kept;
        const Query *queries = shared.queries[s % 4];
        auto load_q = queries_of(a.q, s);
        const unsigned query_rows =
            load_q.rows_of([&](int row) { return queries[row].inverse != 0.0f; });
        load_q(stage.q, query_rows);
        queries_of(a.dout, s)(stage.cotangent, query_rows);
#if GATED
        queries_of(a.gate, s)(stage.gate, query_rows);
#endif
        auto load_k = keys_of(a.k, s);
        const unsigned key_rows = load_k.rows_of([&](int row) { return kept[row] != 0; });
        load_k(stage.k, key_rows);
        keys_of(a.v, s)(stage.v, key_rows);
    };

    PairBiasStream<QUERIES, THREADS, true>(a, at, first_query, first_key, thread)(shared.pair_bias);
    KeyStream::Raw key = {};
    RawQuery queries[2] = {};
    for (int64 s = begin; s < begin + 2; ++s) {
        read_ahead(s, key, queries);
        write_ahead(s, key, queries);
    }
    __syncthreads();
    if (begin < end) load_row(begin);
    cp_async_commit();

    Sums sum = {};
    for (int64 s = begin; s < end; ++s) {
        cp_async_wait<0>();
        Stage &stage = shared.stage[s % 2];
#if GATED
        close_gate(stage.cotangent, stage.gate, QUERIES, queries_of(a.dout, s));
#endif
        __syncthreads();  // the row is there, and the one before has been used
        if (s + 1 < end) load_row(s + 1);
        cp_async_commit();
        read_ahead(s + 2, key, queries);

        const Keys &keys = shared.keys[s % 4];
        Query query[M_TILES][2];
        bool strange = false, any = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = w * OWN + 16 * m + lane() / 4 + 8 * half;
                const float4 x = *reinterpret_cast<const float4 *>(&shared.queries[s % 4][row]);
                query[m][half] = {x.x, x.y, x.z, x.w};
                strange |= fabsf(x.x) > HUGE_LOGIT;
                any |= x.z != 0.0f;
                // δ is not finite where ō is not, nor is the sum of weights where q is not.
                strange |= !(x.z > 0.0f) || !isfinite(x.w);
            }
        if (__any_sync(ALL_LANES, any) && any_kept(keys)) {
            Fragments q, cotangent;
            load_fragments(q, stage.q + w * OWN);
            load_fragments(cotangent, stage.cotangent + w * OWN);
            const Tile tile = {stage.k, keys, shared.pair_bias + w * OWN};
            if (__any_sync(ALL_LANES, strange)) {
                rarely();
                add_row<true>(sum, q, cotangent, tile, stage.v, query, a.scale);
            } else
                add_row<false>(sum, q, cotangent, tile, stage.v, query, a.scale);
        }
        write_ahead(s + 2, key, queries);
    }
    cp_async_wait<0>();

    if (a.parts > 1) {
        const int64 tile = number % a.pair_bias_tiles, part = number / a.pair_bias_tiles;
        int *turn = a.turns + tile;
        if (thread == 0)
            while (atomicAdd(turn, 0) < part) {}
        __syncthreads();
        __threadfence();
        // A thread's numbers lie one after the other across the block.
        float *whole = a.pair_bias_sums + tile * (sizeof(Sums) / sizeof(float) * THREADS);
        const bool last = part + 1 == a.parts;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < BLOCK / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float *place = whole + ((m * (BLOCK / 8) + n) * 4 + e) * THREADS + thread;
                    if (part > 0) sum[m][n][e] += __ldcg(place);
                    if (!last) *place = sum[m][n][e];
                }
        __threadfence();
        __syncthreads();
        if (thread == 0) atomicAdd(turn, 1);
        if (!last) return;
    }

    const Operand &out = a.dpair_bias;
    Element *result =
        static_cast<Element *>(out.data) + at.b * out.stride[0] + at.h * out.stride[2];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < BLOCK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int64 i = first_query + w * OWN + 16 * m + lane() / 4 + 8 * (e / 2);
                const int64 j = first_key + 8 * n + 2 * (lane() % 4) + e % 2;
                if (i < a.Q && j < a.K)
                    round_to(sum[m][n][e], result + i * out.stride[3] + j * out.stride[4]);
            }
}
