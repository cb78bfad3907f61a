// Evoformer attention on tensor cores, backward: dq, dpair_bias and δ in one pass, where a block can
// hold the pair bias of its queries and all keys, and there is no gate.
//
// Both gradients are sums of the same p (dp − δ), over keys the one and over rows s the other. A block
// owns a tile of queries of one head and all keys; the rows s stream by, all of them or a part, as in
// backward_pair_bias. Of each tile of keys every one of GROUPS groups of warps does a part, so that
// dq is left in as many parts, which are added up in order in shared memory. The sums of dpair_bias
// stay: a thread has always the same queries and keys. So does the pair bias.
//
// What limits it is what is read from shared memory: 2 bytes a logit each of k, of v, of k again and of
// the pair bias, with two sixteens of queries a warp, and 8 of a sum of dpair_bias. So those of HELD
// tiles are in registers, as many as there are, and a thread finds its others where only it looks.
//
// Defines: as in evoformer_tensor.cuh; WARPS are those of a group; BLOCK is of keys; GROUPS; TILES, how
// many tiles there are of keys; HELD.

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS * GROUPS;
constexpr int QUERIES = WARPS * OWN;
constexpr int KEYS = TILES * BLOCK;
constexpr int TURNS = BLOCK / (GROUPS * CHUNK);  // a warp's chunks of a tile
constexpr int WIDE = HEAD_DIM + 4;               // floats from row to row of a part of dq
constexpr int PIECES = HEAD_DIM / 8;             // threads that share a query
constexpr int SHARED_SUMS = (TILES - HELD) * BLOCK * QUERIES;

struct Stage {
    Row k[BLOCK], v[BLOCK];
};

// Where a row s of an operand begins, for this block: an address, but for NUMBER the number of the first
// query, see number_of. In shared memory, for want of registers.
enum Place { OF_Q, OF_K, OF_V, OF_DOUT, OF_OUT, OF_DQ, OF_MASK, OF_MASK_BIAS, NUMBER, PLACES };

struct Places {
    int64 of[4][PLACES], step[PLACES];  // of four rows, as all that is read ahead
    int64 dpair_bias, tile, part;
    int begin, end;    // the rows of this block
    unsigned queries;  // that there are
};

struct Shared {
    uint4 pair_bias[TILES * TURNS][CHUNK / 16][M_TILES][THREADS];
    Stage stage[2];
    Row q[2][QUERIES], cotangent[2][QUERIES], out[QUERIES];
    float dq[GROUPS][QUERIES][WIDE];
    Query queries[4][QUERIES];
    Keys keys[4][TILES];
    Places places;
};

static_assert(sizeof(Shared) + 4 * SHARED_SUMS == SHARED_BYTES,
              "the host has another idea of the shared memory");
static_assert(ALIGNED && PAIR_BIAS && !GATED, "elsewhere there are two passes");
static_assert(BLOCK % (GROUPS * CHUNK) == 0 && CHUNK % 16 == 0 && HELD <= TILES,
              "each group has whole chunks of each tile");
static_assert(TILES > 1, "what is read of a row is done with before the next but one is written");
static_assert(QUERIES <= THREADS && 32 % PIECES == 0 && QUERIES * PIECES % 32 == 0,
              "a thread looks after one query; those that share one are of a warp");

using Logits = float[M_TILES][CHUNK / 8][4];

// Where a lane reads of the first chunk: what else there is to an address is known to the compiler.
struct Lane {
    const Element *by_channels, *by_rows;  // of k, in products over channels and over keys
};

// acc[i, j] += Σ_d x[i, d] rows[j, d], as multiply_over_channels.
__device__ inline void over_channels(Logits &acc, const Fragments &x, const Element *rows) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n += 2)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4(words, rows + 8 * n * PITCH + 16 * step);
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][n], x[m][step], first);
                mma_m16n8k16<Element>(acc[m][n + 1], x[m][step], second);
            }
        }
}

// acc[i, d] += Σ_j x[i, j] rows[j, d], with x rounded, as multiply_over_rows.
__device__ inline void over_rows(Result &acc, const Logits &x, const Element *rows) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; n += 2) {
        unsigned left[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const float *pair = &x[m][n + part / 2][part % 2 * 2];
                left[m][part] = pack(pair[0], pair[1]);
            }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4_trans(words, rows + 8 * n * PITCH + 16 * step);
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][2 * step], left[m], first);
                mma_m16n8k16<Element>(acc[m][2 * step + 1], left[m], second);
            }
        }
    }
}

// Products q · k become logits, as in logits(), with the pair bias of bias[n / 2][m].
template <bool STRANGE>
__device__ inline void add_biases(Logits &s, const uint4 (*bias)[M_TILES][THREADS],
                                  const unsigned short *kept, const float *mask_bias, float scale) {
    const int pair = 2 * (lane() % 4);
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n) {
        const unsigned keep = *reinterpret_cast<const unsigned *>(kept + pair + 8 * n);
        float2 add_to_key = {};
        if (MASK_BIAS)
            add_to_key = *reinterpret_cast<const float2 *>(mask_bias + pair + 8 * n);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            const uint4 words = bias[n / 2][m][threadIdx.x];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const unsigned word = n % 2 == 0 ? half == 0 ? words.x : words.y
                                      : half == 0 ? words.z : words.w;
                const float2 add = unpack((word & keep) | (~keep & MINUS_INFINITIES));
                float *logit = &s[m][n][2 * half];
                if (MASK_BIAS) {
                    logit[0] = fmaf(logit[0], scale, add_to_key.x) + add.x;
                    logit[1] = fmaf(logit[1], scale, add_to_key.y) + add.y;
                } else {
                    logit[0] = fmaf(logit[0], scale, add.x);
                    logit[1] = fmaf(logit[1], scale, add.y);
                }
                if (STRANGE && (keep & 0xffffu) == 0) logit[0] = -infinity();
                if (STRANGE && keep >> 16 == 0) logit[1] = -infinity();
            }
        }
    }
}

// Adds some keys to the sums of dpair_bias, and to dq, which is in `unit`s. `shift` has the logarithm of
// total, so that what is summed is divided by it. Nothing where the query has no key, or the key is
// dropped: beside NaN a factor of 0 would not do.
template <bool CAREFUL>
__device__ void add_keys(Logits &sum, Result &dq, float &unit, const Fragments &q,
                         const Fragments &cotangent, const Lane &at, int offset,
                         const unsigned short *kept, const float *mask_bias,
                         const uint4 (*pair_bias)[M_TILES][THREADS], const PerQuery &shift,
                         const PerQuery &delta, const Query *queries, float scale) {
    offset += unknown_zero();
    Logits s = {}, dp = {};
    over_channels(s, q, at.by_channels + offset);
    add_biases<CAREFUL>(s, pair_bias, kept, mask_bias, scale);
    over_channels(dp, cotangent, at.by_channels + offset + BLOCK * PITCH);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int half = e / 2;
                float x = dp[m][n][e] - delta[m][half];
                if (CAREFUL) {
                    const Query &query = queries[16 * m + lane() / 4 + 8 * half];
                    x *= exponential<true>(s[m][n][e], query.top, 0.0f) * query.inverse;
                    const int key = 8 * n + 2 * (lane() % 4) + e % 2;
                    if (query.inverse == 0.0f || kept[key] == 0) x = 0.0f;
                } else {
                    x *= exponential<false>(s[m][n][e], 0.0f, shift[m][half]);
                }
                sum[m][n][e] += x;
                s[m][n][e] = ELEMENT == 1 ? x * (1.0f / unit) : x;
            }
    keep_in_range(s, unit, dq);
    over_rows(dq, s, at.by_rows + offset);
}

__device__ inline int64 address(const void *x) {
    return static_cast<int64>(reinterpret_cast<cuda::std::uintptr_t>(x));
}

// Finds the places of the row at.s.
__device__ inline void find_places(Places &places, const EvoformerArguments &a, const Head &at,
                                   int64 first_query) {
    constexpr int64 size = sizeof(Element);
    const Head group = group_of(a, at);
    int64 *const of = places.of[at.s & 3], *const step = places.step;
    const auto find = [&](Place place, const Operand &x, const Head &head, int64 position) {
        of[place] = address(channels_of(x, head, position)), step[place] = x.stride[1] * size;
    };
    find(OF_Q, a.q, at, first_query), find(OF_DOUT, a.dout, at, first_query);
    find(OF_OUT, a.out, at, first_query), find(OF_DQ, a.dq, at, first_query);
    find(OF_K, a.k, group, 0), find(OF_V, a.v, group, 0);
    of[OF_MASK] = address(a.mask.data) + at.b * a.mask.stride[0] + at.s * a.mask.stride[1];
    step[OF_MASK] = a.mask.stride[1];
    of[OF_MASK_BIAS] = address(a.mask_bias.data) +
               (at.b * a.mask_bias.stride[0] + at.s * a.mask_bias.stride[1]) * size;
    step[OF_MASK_BIAS] = a.mask_bias.stride[1] * size;
    of[NUMBER] = number_of(a, at, first_query), step[NUMBER] = a.H * a.Q;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    evoformer_tensor_backward_query_pair(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    float4 *shared_sums = reinterpret_cast<float4 *>(memory + sizeof(Shared)) + threadIdx.x;
    __shared__ int number;
    const unsigned thread = threadIdx.x, warp = thread / 32, w = warp % WARPS, group = warp / WARPS;

    if (thread == 0)
        number = a.parts > 1 ? atomicAdd(a.turns + a.pair_bias_tiles, 1) : blockIdx.x;
    __syncthreads();
    Tiles block = {number};
    const int64 first_query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES;
    Head at = {};
    at.h = block.next(a.H), at.b = block.next(a.B);
    const int begin = static_cast<int>(a.S * block.rest / a.parts);
    const int end = static_cast<int>(a.S * (block.rest + 1) / a.parts);
    Places &places = shared.places;
    if (thread == 0) {
        find_places(places, a, Head{at.b, begin, at.h}, first_query);
        const Operand &x = a.dpair_bias;
        places.dpair_bias = address(static_cast<Element *>(x.data) + at.b * x.stride[0] +
                                    at.h * x.stride[2] + first_query * x.stride[3]);
        places.queries = clamp(a.Q - first_query, 0, QUERIES);
        places.begin = begin, places.end = end;
        places.tile = number % a.pair_bias_tiles, places.part = number / a.pair_bias_tiles;
    }
    __syncthreads();
    const auto next_places = [&](int s) {
        if (thread < PLACES)
            places.of[s & 3][thread] = places.of[(s + 3) & 3][thread] + places.step[thread];
    };
    const auto place = [&](Place which, int s) {
        return reinterpret_cast<Element *>(places.of[s & 3][which]);
    };
    // Which stage a tile is in.
    const auto parity = [](int s, int t) { return (TILES % 2 == 0 ? t : s + t) & 1; };

    // --- What is read well before it is needed
    constexpr int KEYS_EACH = (KEYS + THREADS - 1) / THREADS;
    struct Ahead {
        KeyStream::Raw keys[KEYS_EACH];
        RawQuery query;
    };
    const bool keys_differ = MASK_BIAS || a.mask.data != nullptr;  // from row to row
    const auto read_ahead = [&](int s, Ahead &ahead) {
        ahead.query = {0.0f, 0.0f, 0.0f};
        if (thread < places.queries) {
            const Softmax softmax = kept_softmax(a, places.of[s & 3][NUMBER] + thread);
            ahead.query = {softmax.top, softmax.total, 0.0f};
        }
#pragma unroll
        for (int n = 0; n < KEYS_EACH; ++n) {
            const unsigned key = thread + n * THREADS;
            KeyStream::Raw &raw = ahead.keys[n];
            raw.mask = key < a.K;
            round_to(0.0f, &raw.bias);
            if (raw.mask != 0 && MASK_BIAS)
                raw.bias = place(OF_MASK_BIAS, s)[key * a.mask_bias.stride[4]];
            if (raw.mask != 0 && a.mask.data != nullptr)
                raw.mask = *reinterpret_cast<const unsigned char *>(places.of[s & 3][OF_MASK] +
                                                                    key * a.mask.stride[2]);
        }
    };
    const auto write_queries = [&](int s, const Ahead &ahead) {
        if (thread < QUERIES) {
            // One that is not there is not one without a key, which would be rare.
            Query query = {0.0f, 0.0f, 1.0f, 0.0f};
            if (thread < places.queries) query = finished(ahead.query);
            if (ahead.query.total > 0.0f) query.shift += log2f(ahead.query.total);
            shared.queries[s & 3][thread] = query;
        }
    };
    const auto write_keys = [&](int s, const Ahead &ahead) {
#pragma unroll
        for (int n = 0; n < KEYS_EACH; ++n) {
            const unsigned key = thread + n * THREADS;
            if (KEYS % THREADS == 0 || key < KEYS)
                write_key(shared.keys[s & 3][key / BLOCK], key % BLOCK, ahead.keys[n]);
        }
    };

    // --- What is copied
    constexpr int PASS = THREADS / PIECES;
    const unsigned own_row = thread / PIECES, piece = thread % PIECES * 8;  // the thread's of a tile
    const auto copy = [&](Row *tile, const Element *from, const Operand &x, unsigned row,
                          bool wanted) {
        cp_async_16(tile[row] + piece, from + row * x.stride[2] + piece, wanted && piece < a.D);
    };
    const auto load_keys = [&](int s, int t) {
        Stage &stage = shared.stage[parity(s, t)];
        const unsigned short *kept = shared.keys[s & 3][t].kept;
        const Element *k = place(OF_K, s) + t * BLOCK * a.k.stride[2];
        const Element *v = place(OF_V, s) + t * BLOCK * a.v.stride[2];
#pragma unroll
        for (int n = 0; n < (BLOCK + PASS - 1) / PASS; ++n) {
            const unsigned row = own_row + n * PASS;
            if (BLOCK % PASS != 0 && row >= BLOCK) break;
            const bool wanted = kept[row] != 0;
            copy(stage.k, k, a.k, row, wanted);
            copy(stage.v, v, a.v, row, wanted);
        }
    };
    const auto load_queries = [&](int s) {
        if (own_row < QUERIES) {
            const bool there = own_row < places.queries;
            copy(shared.q[s & 1], place(OF_Q, s), a.q, own_row, there);
            copy(shared.cotangent[s & 1], place(OF_DOUT, s), a.dout, own_row, there);
            copy(shared.out, place(OF_OUT, s), a.out, own_row, there);
        }
    };

    // --- What is done for a row s before and after its keys
    // δ, of the pieces that this thread itself has loaded; and a query without a key is not looked at.
    const auto prepare = [&](int s) {
        if (own_row >= QUERIES) return;
        Query &query = shared.queries[s & 3][own_row];
        uint4 &cotangent = *reinterpret_cast<uint4 *>(shared.cotangent[s & 1][own_row] + piece);
        const uint4 dO = cotangent;
        const uint4 O = *reinterpret_cast<const uint4 *>(shared.out[own_row] + piece);
        float delta = 0.0f;
        const auto add = [&](unsigned dy_pair, unsigned y_pair) {
            const float2 dy = unpack(dy_pair), y = unpack(y_pair);
            delta += dy.x * y.x + dy.y * y.y;
        };
        add(dO.x, O.x), add(dO.y, O.y), add(dO.z, O.z), add(dO.w, O.w);
#pragma unroll
        for (int distance = 1; distance < PIECES; distance *= 2)
            delta += __shfl_xor_sync(ALL_LANES, delta, distance);
        if (query.inverse == 0.0f) {
            rarely();
            delta = 0.0f;
            cotangent = uint4{0, 0, 0, 0};
            *reinterpret_cast<uint4 *>(shared.q[s & 1][own_row] + piece) = uint4{0, 0, 0, 0};
        }
        if (piece == 0) {
            query.delta = delta;
            if (own_row < places.queries) a.delta[places.of[s & 3][NUMBER] + own_row] = delta;
        }
    };
    const bool dq_by_16_bytes = aligned(a.dq);
    const auto store_dq = [&](int s) {
        if (own_row >= places.queries || piece >= a.D) return;
        const bool alive = shared.queries[s & 3][own_row].inverse != 0.0f;
        float sum[8] = {};
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
#pragma unroll
            for (int e = 0; e < 8; e += 4) {
                const float4 x =
                    *reinterpret_cast<const float4 *>(shared.dq[g][own_row] + piece + e);
                sum[e] += x.x, sum[e + 1] += x.y, sum[e + 2] += x.z, sum[e + 3] += x.w;
            }
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] = alive ? sum[e] * a.scale : 0.0f;
        Element *target = place(OF_DQ, s) + own_row * a.dq.stride[2] + piece * a.dq.stride[4];
        if (dq_by_16_bytes)
            *reinterpret_cast<uint4 *>(target) = uint4{pack(sum[0], sum[1]), pack(sum[2], sum[3]),
                                                       pack(sum[4], sum[5]), pack(sum[6], sum[7])};
        else
#pragma unroll
            for (int e = 0; e < 8; ++e) round_to(sum[e], target + e * a.dq.stride[4]);
    };

    // --- The pair bias, and what the first rows need
    const Operand &bias = a.pair_bias;
    const Element *bias_of_head = static_cast<const Element *>(bias.data) +
                                  at.b * bias.stride[0] + at.h * bias.stride[2];
    // Of two keys; 0 where there are none.
    const auto read_bias = [&](int64 i, int64 j) {
        const Element *from = bias_of_head + i * bias.stride[3] + j * bias.stride[4];
        if (i >= a.Q || j >= a.K) return 0u;
        if (ALIGNED_BIAS) return *reinterpret_cast<const unsigned *>(from);
        return pack(to_float(from[0]), j + 1 < a.K ? to_float(from[bias.stride[4]]) : 0.0f);
    };
    // The first key of a chunk.
    const auto key_of = [&](int t, int c) { return t * BLOCK + (c * GROUPS + group) * CHUNK; };
#pragma unroll 1
    for (int c = 0; c < TILES * TURNS; ++c)
#pragma unroll
        for (int n = 0; n < CHUNK / 16; ++n)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                const int64 i = first_query + w * OWN + 16 * m + lane() / 4;
                const int64 j = key_of(c / TURNS, c % TURNS) + 16 * n + 2 * (lane() % 4);
                shared.pair_bias[c][n][m][thread] =
                    uint4{read_bias(i, j), read_bias(i + 8, j), read_bias(i, j + 8),
                          read_bias(i + 8, j + 8)};
            }
    for (int n = 0; n < SHARED_SUMS / 4 / THREADS; ++n)
        shared_sums[n * THREADS] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    for (int s = begin; s < begin + 4; ++s) {
        if (s > begin) next_places(s);
        __syncthreads();
        Ahead ahead = {};
        if (s < end) read_ahead(s, ahead);
        write_queries(s, ahead);
        write_keys(s, ahead);
    }
    if (begin < end) load_queries(begin);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (begin < end) prepare(begin), load_keys(begin, 0);
    if (begin + 1 < end) load_queries(begin + 1);
    cp_async_commit();

    const Row *own_keys = shared.stage[0].k + group * CHUNK;
    const Lane own = {own_keys[lane() % 8 + lane() / 16 * 8] + lane() / 8 % 2 * 8,
                      own_keys[lane() % 16] + lane() / 16 * 8};
    float sums[HELD > 0 ? HELD : 1][TURNS][M_TILES][CHUNK / 8][4] = {};
    for (int s = begin; s < places.end; ++s) {
        const Query *queries = shared.queries[s & 3] + w * OWN;
        Fragments q, cotangent;
        PerQuery shift, delta;
        bool careful = false;
        Result dq = {};
        float unit = FIRST_UNIT;
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
            cp_async_wait<0>();
            __syncthreads();  // the tile is there, and the one before has been used
            if (t + 1 < TILES)
                load_keys(s, t + 1);
            else if (s + 1 < places.end)
                load_keys(s + 1, 0);
            if (t == 1 && s + 2 < places.end) load_queries(s + 2);
            cp_async_commit();
            if (t == 0) {
                if (s > places.begin) {
                    store_dq(s - 1);
                    next_places(s + 2);
                }
                if (s + 1 < places.end) prepare(s + 1);
                const unsigned now = thread + unknown_zero(), row = now / 32 % WARPS * OWN;
                const Element *own_q = shared.q[s & 1][row + now % 16] + now / 16 % 2 * 8;
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int step = 0; step < STEPS; ++step) {
                        const Element *from = own_q + 16 * (m * PITCH + step);
                        ldmatrix_x4(q[m][step], from);
                        ldmatrix_x4(cotangent[m][step], from + 2 * QUERIES * PITCH);
                    }
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float4 x = *reinterpret_cast<const float4 *>(
                            &shared.queries[s & 3][row + now % 32 / 4 + 16 * m + 8 * half]);
                        shift[m][half] = x.y, delta[m][half] = x.w;
                        careful |= fabsf(x.x) > HUGE_LOGIT;
                        // δ is not finite where ō is not, nor is the sum of weights where q is not.
                        careful |= !(x.z > 0.0f) || !isfinite(x.w);
                    }
                careful = __any_sync(ALL_LANES, careful);
            }
            Ahead ahead;
            if (t + 1 == TILES && s + 2 < places.end) read_ahead(s + 2, ahead);

            // The group's first chunk of the tile.
            const unsigned short *kept = shared.keys[s & 3][t].kept + group * CHUNK;
            const float *mask_bias = shared.keys[s & 3][t].bias + group * CHUNK;
#pragma unroll
            for (int c = 0; c < TURNS; ++c) {
                const int from = c * GROUPS * CHUNK;
                const int offset =
                    parity(s, t) * static_cast<int>(sizeof(Stage) / sizeof(Element)) + from * PITCH;
                // Besides what it saves: a branch here keeps the compiler from having all chunks in
                // registers.
                if (!__any_sync(ALL_LANES, (kept + lane() % CHUNK)[from] != 0)) continue;
                const auto *pair_bias = shared.pair_bias[t * TURNS + c];
                const auto add = [&](Logits &sum) {
                    if (careful) {
                        rarely();
                        add_keys<true>(sum, dq, unit, q, cotangent, own, offset, kept + from,
                                       mask_bias + from, pair_bias, shift, delta, queries,
                                       a.scale);
                    } else
                        add_keys<false>(sum, dq, unit, q, cotangent, own, offset, kept + from,
                                        mask_bias + from, pair_bias, shift, delta, queries,
                                        a.scale);
                };
                if (t < HELD) {
                    add(sums[t < HELD ? t : 0][c]);
                } else {
                    Logits sum;
                    float4 *place =
                        shared_sums + ((t - HELD) * TURNS + c) * M_TILES * (CHUNK / 8) * THREADS;
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                        for (int n = 0; n < CHUNK / 8; ++n) {
                            const float4 x = place[(m * (CHUNK / 8) + n) * THREADS];
                            sum[m][n][0] = x.x, sum[m][n][1] = x.y;
                            sum[m][n][2] = x.z, sum[m][n][3] = x.w;
                        }
                    add(sum);
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                        for (int n = 0; n < CHUNK / 8; ++n)
                            place[(m * (CHUNK / 8) + n) * THREADS] = float4{
                                sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]};
                }
            }
            if (t + 1 == TILES && s + 2 < places.end) {
                write_queries(s + 2, ahead);
                if (keys_differ) write_keys(s + 2, ahead);
            }
        }
        const float by = ELEMENT == 1 ? unit : 1.0f;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n)
                    *reinterpret_cast<float2 *>(
                        shared.dq[group][w * OWN + 16 * m + lane() / 4 + 8 * half] + 8 * n +
                        2 * (lane() % 4)) =
                        float2{dq[m][n][2 * half] * by, dq[m][n][2 * half + 1] * by};
    }
    cp_async_wait<0>();
    __syncthreads();
    if (places.begin < places.end) store_dq(places.end - 1);

    // --- dpair_bias
    const int64 tile = places.tile, part = places.part;
    const int there = places.queries;
    Element *result = reinterpret_cast<Element *>(places.dpair_bias);
    const bool shares = a.parts > 1, last = part + 1 == a.parts;
    int *turn = a.turns + tile;
    if (shares) {
        if (thread == 0)
            while (atomicAdd(turn, 0) < part) {}
        __syncthreads();
        __threadfence();
    }
    const Operand &out = a.dpair_bias;
    // A thread's numbers lie one after the other across the block.
    float *whole = a.pair_bias_sums + tile * (KEYS * QUERIES) + thread;
#pragma unroll
    for (int t = 0; t < TILES; ++t)
#pragma unroll
        for (int c = 0; c < TURNS; ++c) {
            if (key_of(t, c) >= a.K) continue;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n) {
                    const int at_once = (m * (CHUNK / 8) + n);
                    float sum[4];
                    if (t < HELD) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) sum[e] = sums[t < HELD ? t : 0][c][m][n][e];
                    } else {
                        const float4 x =
                            shared_sums[(((t - HELD) * TURNS + c) * M_TILES * (CHUNK / 8) + at_once) *
                                        THREADS];
                        sum[0] = x.x, sum[1] = x.y, sum[2] = x.z, sum[3] = x.w;
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float *place =
                            whole +
                            (((t * TURNS + c) * M_TILES * (CHUNK / 8) + at_once) * 4 + e) * THREADS;
                        if (part > 0) sum[e] += __ldcg(place);
                        if (!last) *place = sum[e];
                        const int i = w * OWN + 16 * m + lane() / 4 + 8 * (e / 2);
                        const int j = key_of(t, c) + 8 * n + 2 * (lane() % 4) + e % 2;
                        if (last && i < there && j < a.K)
                            round_to(sum[e], result + i * out.stride[3] + j * out.stride[4]);
                    }
                }
        }
    if (shares) {
        __threadfence();
        __syncthreads();
        if (thread == 0) atomicAdd(turn, 1);
    }
}

// Before it, where blocks share a tile: none has started yet, and none is added up.
extern "C" __global__ void __launch_bounds__(256)
    evoformer_tensor_backward_query_pair_turns(const EvoformerArguments a) {
    for (int64 n = threadIdx.x; n <= a.pair_bias_tiles; n += 256) a.turns[n] = 0;
}
