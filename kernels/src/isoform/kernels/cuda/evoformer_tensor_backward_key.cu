// Evoformer attention on tensor cores, backward: dk and dv, and the parts of dmask_bias.
//
// A block does a tile of keys, of one key/value head, of ROWS rows s at once; the queries of all heads
// of the group stream by. Here the rows of the products are keys: of Sᵀ = K Qᵀ, a warp holds some keys
// and all queries of a tile, so that Pᵀ and dSᵀ are left operands of the sums over queries.
//
// Defines: as in evoformer_tensor.cuh; BLOCK is of queries; GATED: whether there is a gate.

#define BIAS_COLUMNS (16 * M_TILES * WARPS)
#include "evoformer_mask_bias.cuh"
#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int KEYS = WARPS * OWN;
constexpr int VALUES = ROWS * KEYS;
constexpr bool RELOAD = M_TILES * HEAD_DIM > 64;  // for want of registers

struct Stage {
    Row q[ROWS][BLOCK], cotangent[ROWS][BLOCK];
#if GATED
    Row gate[ROWS][BLOCK];
#endif
    BiasRow pair_bias[BLOCK];
};

// A tile of queries, and again what all logits need, as they need it.
struct Queries {
    Query of[BLOCK];
    float4 minus_delta[BLOCK / 2];  // of two queries, twice, as accumulators begin
    float shift[BLOCK];             // with the logarithm of total: weights need not be divided by it
    alignas(16) unsigned char kinds[16];  // of each 32: ANY if one has a key, HUGE if one has such logits
};
static_assert(BLOCK % 32 == 0 && BLOCK / 32 <= 16, "a warp looks after 32 queries");
constexpr unsigned ANY = 1, HUGE = 2;

struct Shared {
    Row k[ROWS][KEYS], v[ROWS][KEYS];
    Stage stage[2];
    Queries queries[4][ROWS];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// Logits s become weights p, and dp − δ the logits' gradients p (dp − δ).
template <bool EXACT>
__device__ void differentiate(float (&s)[M_TILES][CHUNK / 8][4],
                              float (&dp)[M_TILES][CHUNK / 8][4], const Queries &queries,
                              int first) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
        const int column = first + 8 * n + 2 * (lane() % 4);
        const float2 shift = *reinterpret_cast<const float2 *>(queries.shift + column);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (EXACT) {
                    const Query &at = queries.of[column + e % 2];
                    s[m][n][e] = exponential<true>(s[m][n][e], at.top, at.shift) * at.inverse;
                } else {
                    s[m][n][e] =
                        exponential<false>(s[m][n][e], 0.0f, e % 2 == 0 ? shift.x : shift.y);
                }
                dp[m][n][e] *= s[m][n][e];
            }
    }
}

__device__ inline void write_query(Queries &queries, int i, const RawQuery &raw) {
    const Query query = finished(raw);
    queries.of[i] = query;
    // One without a key has no weights.
    queries.shift[i] = query.inverse == 0.0f ? infinity() : query.shift + log2f(raw.softmax.total());
    float *start = reinterpret_cast<float *>(&queries.minus_delta[i / 2]) + i % 2;
    start[0] = start[2] = -query.delta;
    const bool any = __any_sync(ALL_LANES, query.inverse != 0.0f);
    const bool huge = __any_sync(ALL_LANES, fabsf(query.top) > HUGE_LOGIT);
    if (i % 32 == 0) queries.kinds[i / 32] = (any ? ANY : 0) | (huge ? HUGE : 0);
}

// What a warp holds of its keys, and sums for them.
struct Own {
    const Row *rows;  // k, and VALUES rows further v
    Fragments k, v;  // of them, unless these are too many registers
    float bias[M_TILES][2];  // the mask bias, −inf of a dropped key
    Result dk, dv;
    float dmask_bias[M_TILES][2], unit;

    // Adds a tile of queries.
    template <bool EXACT>
    __device__ void add(const Row *q, const Row *cotangent, const BiasRow *pair_bias, int column,
                        const Queries &queries, float scale) {
#pragma unroll UNROLL
        for (int first = 0; first < BLOCK; first += CHUNK) {
            float s[M_TILES][CHUNK / 8][4] = {}, dp[M_TILES][CHUNK / 8][4];
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const float4 x = queries.minus_delta[first / 2 + 4 * n + lane() % 4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
                    dp[m][n][0] = x.x, dp[m][n][1] = x.y, dp[m][n][2] = x.z, dp[m][n][3] = x.w;
            }
            if constexpr (RELOAD)
                multiply_over_channels(s, rows, q + first);
            else
                multiply_over_channels(s, k, q + first);
            add_biases(s, pair_bias + first, column, scale);
            if constexpr (RELOAD)
                multiply_over_channels(dp, rows + VALUES, cotangent + first);
            else
                multiply_over_channels(dp, v, cotangent + first);
            differentiate<EXACT>(s, dp, queries, first);
            multiply_over_rows(dv, s, cotangent + first);
            if (MASK_BIAS) {
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) dmask_bias[m][e / 2] += dp[m][n][e];
            }
            in_units(dp);
            keep_in_range(dp, unit, dk);
            multiply_over_rows(dk, dp, q + first);
        }
    }

    __device__ void add_biases(float (&s)[M_TILES][CHUNK / 8][4], const BiasRow *pair_bias,
                               int column, float scale) const {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; n += 2)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                unsigned pair[4] = {0, 0, 0, 0};  // rows, rows + 8; then the next eight queries
                if (PAIR_BIAS)
                    ldmatrix_x4_trans(pair, pair_bias[8 * n + lane() % 8 + 8 * (lane() / 16)] +
                                                column + 16 * m + 8 * (lane() / 8 % 2));
#pragma unroll
                for (int part = 0; part < 4; ++part) {
                    float *logit = &s[m][n + part / 2][part % 2 * 2];
                    const float2 add = unpack(pair[part]);
                    if (MASK_BIAS) {
                        logit[0] = fmaf(logit[0], scale, bias[m][part % 2]) + add.x;
                        logit[1] = fmaf(logit[1], scale, bias[m][part % 2]) + add.y;
                    } else {
                        logit[0] = fmaf(logit[0], scale, add.x);
                        logit[1] = fmaf(logit[1], scale, add.y);
                    }
                }
            }
    }

    __device__ void in_units(float (&dp)[M_TILES][CHUNK / 8][4]) const {
#if ELEMENT == 1
        const float by = 1.0f / unit;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) dp[m][n][e] *= by;
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    evoformer_tensor_backward_key(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int warp = threadIdx.x / 32, r = warp / WARPS, w = warp % WARPS;
    const int thread = threadIdx.x % (32 * WARPS);  // among those of row r

    Blocks block = {blockIdx.x};
    const int64 first_key = block.next(tiles_of(a.K, KEYS)) * KEYS;
    const int64 own_key = first_key + w * OWN;
    Head group;  // h is the key/value head here
    group.h = block.next(a.G), group.s = block.next(tiles_of(a.S, ROWS)) * ROWS + r;
    group.b = block.rest;
    const bool present = group.s < a.S;
    Row *own_k = shared.k[r] + w * OWN, *own_v = shared.v[r] + w * OWN;

    // The tiles of queries of one head, then those of the next.
    const int per_head = tiles_of(a.Q, BLOCK), heads = static_cast<int>(a.H / a.G);
    const int64 first_head = group.h * heads;
    const int tiles = per_head * heads;
    const auto head_of = [&](int t) {
        return Head{group.b, group.s, heads == 1 ? group.h : first_head + t / per_head};
    };
    const auto first_query = [&](int t) {
        return static_cast<int64>(heads == 1 ? t : t % per_head) * BLOCK;
    };
    const auto read_queries = [&](int t) {
        const bool there = present && t < tiles && thread < BLOCK;
        return read_query(a, there ? head_of(t) : group, there, there ? first_query(t) + thread : 0);
    };
    using QueryStream = RowStream<BLOCK, 32 * WARPS>;
    using BiasStream = PairBiasStream<BLOCK, THREADS, false>;
    const auto stream = [&](const Operand &x, const Head &at, int64 first) {
        return QueryStream(a, x, at, first, thread);
    };
    QueryStream load_q = stream(a.q, head_of(0), 0);
    QueryStream load_cotangent = stream(a.dout, head_of(0), 0);
#if GATED
    QueryStream load_gate = stream(a.gate, head_of(0), 0);
#endif
    BiasStream load_pair_bias(a, head_of(0), 0, first_key, threadIdx.x);
    const auto load_tile = [&](int t) {
        Stage &stage = shared.stage[t % 2];
        // The next head; or always, where addresses must not take registers.
        if (RELOAD || (heads > 1 && t % per_head == 0)) {
            const Head at = head_of(t);
            const int64 first = first_query(t);
            load_q = stream(a.q, at, first), load_cotangent = stream(a.dout, at, first);
#if GATED
            load_gate = stream(a.gate, at, first);
#endif
            load_pair_bias = BiasStream(a, at, first, first_key, threadIdx.x);
        }
        const Query *queries = shared.queries[t % 4][r].of;
        const auto wanted = [&](int row) { return queries[row].inverse != 0.0f; };
        const unsigned rows = load_q.rows_of(wanted);
        load_q(stage.q[r], rows);
        load_cotangent(stage.cotangent[r], rows);
#if GATED
        load_gate(stage.gate[r], rows);
#endif
        if (PAIR_BIAS) load_pair_bias(stage.pair_bias);
    };

    const auto wanted = [&](int row) { return present && kept(a, group, own_key + row); };
    RowStream<OWN, 32>(a, a.k, group, own_key, lane())(own_k, wanted);
    RowStream<OWN, 32>(a, a.v, group, own_key, lane())(own_v, wanted);
    if (thread < BLOCK) {
        write_query(shared.queries[0][r], thread, read_queries(0));
        write_query(shared.queries[1][r], thread, read_queries(1));
    }
    __syncthreads();
    if (tiles > 0) load_tile(0);
    cp_async_commit();

    Own work = {};
    work.unit = FIRST_UNIT, work.rows = own_k;
    const auto key_of = [&](int m, int half) { return 16 * m + lane() / 4 + 8 * half; };
    const auto alive = [&](int m, int half) { return wanted(key_of(m, half)); };
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            work.bias[m][half] = alive(m, half)
                                     ? mask_bias_of(a, group, own_key + key_of(m, half))
                                     : -infinity();

    for (int t = 0; t < tiles; ++t) {
        cp_async_wait<0>();
        Stage &stage = shared.stage[t % 2];
#if GATED
        close_gate(stage.cotangent[r], stage.gate[r], BLOCK, load_gate);
#endif
        __syncthreads();  // the tile is there, and the one before has been used
        if (t == 0 && !RELOAD) {
            load_fragments(work.k, own_k);
            load_fragments(work.v, own_v);
        }
        if (t + 1 < tiles) load_tile(t + 1);
        cp_async_commit();
        const RawQuery ahead = read_queries(t + 2);

        const Queries &queries = shared.queries[t % 4][r];
        unsigned kinds = 0;
#pragma unroll
        for (int i = 0; i < BLOCK / 32; ++i) kinds |= queries.kinds[i];
        if ((kinds & ANY) != 0) {
            if ((kinds & HUGE) != 0) {
                rarely();
                work.template add<true>(stage.q[r], stage.cotangent[r], stage.pair_bias, w * OWN,
                                        queries, a.scale);
            } else
                work.template add<false>(stage.q[r], stage.cotangent[r], stage.pair_bias, w * OWN,
                                         queries, a.scale);
        }
        if (thread < BLOCK) write_query(shared.queries[(t + 2) % 4][r], thread, ahead);
    }
    if (!present) return;
    cp_async_wait<0>();  // of own_k and own_v, where there is no tile
    __syncwarp();

    if (a.mask_bias_parts != nullptr) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = over_row(work.dmask_bias[m][half]);
                const int64 j = own_key + key_of(m, half);
                if (j < a.K && lane() % 4 == 0)
                    a.mask_bias_parts[((group.b * a.S + group.s) * a.G + group.h) * a.K + j] =
                        alive(m, half) ? sum : 0.0f;
            }
    }
    if (a.dk.data != nullptr) {
        const float scale = ELEMENT == 1 ? a.scale * work.unit : a.scale;
        ::stage(own_k, work.dk, [&](int, int) { return scale; }, alive);
        __syncwarp();
        store_rows(own_k, a, a.dk, group, own_key, a.K);
    }
    if (a.dv.data != nullptr) {
        ::stage(own_v, work.dv, [](int, int) { return 1.0f; }, alive);
        __syncwarp();
        store_rows(own_v, a, a.dv, group, own_key, a.K);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    evoformer_tensor_backward_mask_bias(const EvoformerArguments a) {
    add_up_mask_bias(a);
}
