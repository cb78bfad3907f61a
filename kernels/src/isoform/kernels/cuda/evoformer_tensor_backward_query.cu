// Evoformer attention on tensor cores, backward: dq, dgate, and what the other passes need, δ.
//
// Organised like the forward: a block does a tile of queries of one head, of ROWS rows s at once, and
// all keys stream by. The softmax is not computed again but read, as `top` and `total`.
//
// Without a gate, δ_i = Σ_d ō_id o_id comes from O as the forward returned it, rounded. With one, what
// the forward returned is the gated O, of other roundings than ō · v_j is made of, and where a query
// looks at one key alone the two would not cancel. So δ_i = Σ_j p_ij (ō_i · v_j) is summed first, with
// the keys streaming by once more. (dgate_id = dy_id out_id σ(−gate_id) needs no O but the gated.)

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int QUERIES = WARPS * OWN;

struct Stage {
    Row k[ROWS][BLOCK], v[ROWS][BLOCK];
    BiasRow pair_bias[QUERIES];
};

struct Shared {
    Row own[ROWS][QUERIES];        // q, out, gate, dgate and dq, one after the other
    Row cotangent[ROWS][QUERIES];  // dO
    Stage stage[2];
    Keys keys[4][ROWS];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// Logits s become their gradients e^(s − top) (dp − δ) in `unit`s; the division by total is left for
// the end.
template <bool EXACT>
__device__ void differentiate(float (&s)[M_TILES][CHUNK / 8][4],
                              const float (&dp)[M_TILES][CHUNK / 8][4], const PerQuery &top,
                              const PerQuery &shift, const PerQuery &delta, float unit) {
    const float scaled = ELEMENT == 1 ? 1.0f / unit : 1.0f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int half = e / 2;
                s[m][n][e] = exponential<EXACT>(s[m][n][e], top[m][half], shift[m][half]) *
                             ((dp[m][n][e] - delta[m][half]) * scaled);
            }
}

// pivot_i = dp_ij of one key j of the chunk, 0 if that is not finite.
__device__ void choose_pivot(PerQuery &pivot, const float (&dp)[M_TILES][CHUNK / 8][4], int key) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            if (key / 8 != n || key % 2 != e) continue;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float some = __shfl_sync(ALL_LANES, dp[m][n][2 * half + e],
                                                   lane() / 4 * 4 + key % 8 / 2);
                    pivot[m][half] = isfinite(some) ? some : 0.0f;
                }
        }
}

// delta += Σ_j e^(s_ij − top) (dp_ij − pivot_i), where pivot is some dp_ij: where all are alike, δ is that
// one, to the last bit.
template <bool EXACT>
__device__ void sum_delta(PerQuery &delta, const float (&s)[M_TILES][CHUNK / 8][4],
                          const float (&dp)[M_TILES][CHUNK / 8][4], const PerQuery &pivot,
                          const PerQuery &top, const PerQuery &shift) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = 0.0f;  // by itself: shorter sums round less
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; ++e)
                    sum += exponential<EXACT>(s[m][n][e], top[m][half], shift[m][half]) *
                           (dp[m][n][e] - pivot[m][half]);
            delta[m][half] += sum;
        }
}

// Adds a tile of keys to dq, which is in `unit`s and not yet divided by total.
template <bool CAREFUL>
__device__ void add_to_dq(Result &dq, float &unit, const Fragments &q, const Fragments &cotangent,
                          const Tile &tile, const Row *v, const PerQuery &top,
                          const PerQuery &shift, const PerQuery &delta, float scale) {
#pragma unroll UNROLL
    for (int first = 0; first < BLOCK; first += CHUNK) {
        float s[M_TILES][CHUNK / 8][4], dp[M_TILES][CHUNK / 8][4] = {};
        logits<CAREFUL>(s, q, tile, first, scale);
        multiply_over_channels(dp, cotangent, v + first);
        differentiate<CAREFUL>(s, dp, top, shift, delta, unit);
        keep_in_range(s, unit, dq);
        multiply_over_rows(dq, s, tile.k + first);
    }
}

// Adds a tile of keys to δ − pivot, not yet divided by total.
template <bool CAREFUL>
__device__ void add_to_delta(PerQuery &delta, PerQuery &pivot, bool &has_pivot, const Fragments &q,
                             const Fragments &cotangent, const Tile &tile, const Row *v,
                             const PerQuery &top, const PerQuery &shift, float scale) {
#pragma unroll UNROLL
    for (int first = 0; first < BLOCK; first += CHUNK) {
        float s[M_TILES][CHUNK / 8][4], dp[M_TILES][CHUNK / 8][4] = {};
        logits<CAREFUL>(s, q, tile, first, scale);
        multiply_over_channels(dp, cotangent, v + first);
        if (!has_pivot) {
            const bool is_kept = tile.keys.kept[first + lane() % CHUNK] != 0;
            const int some = __ffs(__ballot_sync(ALL_LANES, is_kept)) - 1;
            if (some >= 0) choose_pivot(pivot, dp, some), has_pivot = true;
        }
        sum_delta<CAREFUL>(delta, s, dp, pivot, top, shift);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    evoformer_tensor_backward_query(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int warp = threadIdx.x / 32, r = warp / WARPS, w = warp % WARPS;
    const int thread = threadIdx.x % (32 * WARPS);  // among those of row r

    if (a.turns != nullptr)  // backward_pair_bias will count there
        for (int64 n = static_cast<int64>(blockIdx.x) * THREADS + threadIdx.x;
             n <= a.pair_bias_tiles; n += static_cast<int64>(gridDim.x) * THREADS)
            a.turns[n] = 0;

    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first_query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES;
    const int64 own_query = first_query + w * OWN;
    Head at;
    at.h = block.next(a.H), at.s = block.next(tiles_of(a.S, ROWS)) * ROWS + r, at.b = block.rest;
    const bool present = at.s < a.S;
    const Head group = group_of(a, at);
    Row *own = shared.own[r] + w * OWN, *own_cotangent = shared.cotangent[r] + w * OWN;

    // The tiles of keys: a round for δ where there is a gate, and one for dq where it is wanted.
    const int per_round = tiles_of(a.K, BLOCK);
    const int for_delta = GATED ? per_round : 0;
    const int tiles = for_delta + (a.dq.data != nullptr ? per_round : 0);
    KeyStream keys(a, at, present && thread < BLOCK, thread);
    int next_key_tile = 0;
    const auto read_keys = [&] {
        if (GATED && next_key_tile++ == for_delta)  // from the start again
            keys = KeyStream(a, at, present && thread < BLOCK, thread);
        return keys.read(a);
    };
    const auto there = [&](int row) { return present && own_query + row < a.Q; };
    const auto load_own = [&](Row *rows, const Operand &x) {
        RowStream<OWN, 32>(a, x, at, own_query, lane())(rows, there);
    };
    const auto wait_for_own = [&] {
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
    };
    using Rows = RowStream<BLOCK, 32 * WARPS>;
    using BiasStream = PairBiasStream<QUERIES, THREADS, true>;
    Rows load_k(a, a.k, group, 0, thread), load_v(a, a.v, group, 0, thread);
    BiasStream load_pair_bias(a, at, first_query, 0, threadIdx.x);
    const auto load_tile = [&](int t) {
        Stage &stage = shared.stage[t % 2];
        const unsigned short *kept = shared.keys[t % 4][r].kept;
        if (GATED && t == for_delta) {  // from the start again
            load_k = Rows(a, a.k, group, 0, thread);
            load_v = Rows(a, a.v, group, 0, thread);
            load_pair_bias = BiasStream(a, at, first_query, 0, threadIdx.x);
        }
        const unsigned rows = load_k.rows_of([&](int row) { return kept[row] != 0; });
        load_k(stage.k[r], rows);
        load_v(stage.v[r], rows);
        if (PAIR_BIAS) load_pair_bias(stage.pair_bias);
    };

    if (thread < BLOCK) {
        write_key(shared.keys[0][r], thread, read_keys());
        write_key(shared.keys[1][r], thread, read_keys());
    }
    load_own(own, a.q);
    load_own(own_cotangent, a.dout);
    __syncthreads();
    if (tiles > 0) load_tile(0);

    PerQuery top, shift, total, delta;
    bool exact = false;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + lane() / 4 + 8 * half;
            const bool is_there = there(row);
            const int64 n = is_there ? number_of(a, at, own_query + row) : 0;
            const KeptSoftmax kept = is_there ? kept_softmax(a, n) : no_softmax(-infinity());
            top[m][half] = kept.top, total[m][half] = kept.total();
            shift[m][half] = top[m][half] == -infinity() ? 0.0f : top[m][half] * LOG2_E;
            delta[m][half] = 0.0f;
            exact |= fabsf(top[m][half]) > HUGE_LOGIT && top[m][half] != -infinity();
        }
    exact = __any_sync(ALL_LANES, exact);

    wait_for_own();
    Fragments q, cotangent;
    load_fragments(q, own);
    load_fragments(cotangent, own_cotangent);
    const bool careful = exact || any_not_finite(q);
    __syncwarp();
    load_own(own, a.out);
    wait_for_own();
    {
        Fragments out;
        load_fragments(out, own);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    const float2 dy = unpack(cotangent[m][step][part]);
                    const float2 y = unpack(out[m][step][part]);
                    delta[m][part % 2] += dy.x * y.x + dy.y * y.y;
                }
            if (GATED) delta[m][0] = delta[m][1] = 0.0f;
        }
        if (GATED) {
            __syncwarp();
            load_own(own, a.gate);
            wait_for_own();
            Fragments gate;
            load_fragments(gate, own);
            __syncwarp();
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int step = 0; step < STEPS; ++step)
#pragma unroll
                    for (int part = 0; part < 4; ++part) {
                        const float2 dy = unpack(cotangent[m][step][part]);
                        const float2 y = unpack(out[m][step][part]);
                        const float2 g = unpack(gate[m][step][part]);
                        const int row = 16 * m + lane() / 4 + 8 * (part % 2);
                        const int d = 16 * step + 2 * (lane() % 4) + 8 * (part / 2);
                        // σ(−g): 1 − σ(g) would cancel
                        *reinterpret_cast<unsigned *>(own[row] + d) =
                            total[m][part % 2] == 0.0f
                                ? 0u
                                : pack(dy.x * y.x * sigmoid(-g.x), dy.y * y.y * sigmoid(-g.y));
                        cotangent[m][step][part] =
                            pack(dy.x * sigmoid(g.x), dy.y * sigmoid(g.y));
                    }
            __syncwarp();
            if (a.dgate.data != nullptr && present)
                store_rows(own, a, a.dgate, at, own_query, a.Q);
        }
    }

    PerQuery pivot = {};
    bool has_pivot = false;
    // δ is whole: the lanes of a query add what each has.
    const auto finish_delta = [&] {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float &sum = delta[m][half];
                sum = over_row(sum);
                if (for_delta > 0 && total[m][half] != 0.0f)
                    sum = pivot[m][half] + sum / total[m][half];
                const int row = 16 * m + lane() / 4 + 8 * half;
                if (there(row) && lane() % 4 == 0) a.delta[number_of(a, at, own_query + row)] = sum;
            }
    };
    if (!GATED || for_delta == 0) finish_delta();

    Result dq = {};
    float unit = FIRST_UNIT;
    for (int t = 0; t < tiles; ++t) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the one before has been used
        if (t + 1 < tiles) load_tile(t + 1);
        cp_async_commit();
        const KeyStream::Raw ahead = read_keys();

        const Stage &stage = shared.stage[t % 2];
        const Tile tile = {stage.k[r], shared.keys[t % 4][r], stage.pair_bias + w * OWN};
        if (any_kept(tile.keys)) {
            const Row *v = stage.v[r];
            if (GATED && t < for_delta) {
                if (careful) {
                    rarely();
                    add_to_delta<true>(delta, pivot, has_pivot, q, cotangent, tile, v, top, shift,
                                       a.scale);
                } else
                    add_to_delta<false>(delta, pivot, has_pivot, q, cotangent, tile, v, top, shift,
                                        a.scale);
            } else if (careful) {
                rarely();
                add_to_dq<true>(dq, unit, q, cotangent, tile, v, top, shift, delta, a.scale);
            } else
                add_to_dq<false>(dq, unit, q, cotangent, tile, v, top, shift, delta, a.scale);
        }
        if (thread < BLOCK) write_key(shared.keys[(t + 2) % 4][r], thread, ahead);
        if (GATED && t + 1 == for_delta) finish_delta();
    }
    if (!present || a.dq.data == nullptr) return;
    __syncwarp();
    const float scale = ELEMENT == 1 ? a.scale * unit : a.scale;
    stage(
        own, dq, [&](int m, int half) { return scale / total[m][half]; },
        [&](int m, int half) { return total[m][half] != 0.0f; });
    __syncwarp();
    store_rows(own, a, a.dq, at, own_query, a.Q);
}
