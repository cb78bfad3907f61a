// Evoformer attention on tensor cores, backward: dq, dpair_bias and δ in one pass, where a block can
// hold the pair bias of its queries and all keys, and there is no gate.
//
// Both gradients are sums of the same p (dp − δ), over keys the one and over rows s the other. A block
// owns a tile of queries of one head and all keys; the rows s stream by, all of them or a part, as in
// backward_pair_bias. Each of its warps has BLOCK keys to itself: it copies their k and v, nobody else
// reads them, and it waits for nobody before it multiplies with them. Of a row it does all QUERIES, 32
// at a time (GROUPS times), and as soon as the last of them are done with sixteen keys, those of the
// next row are copied into their place. So the copies are under way for half a row or more, and warps
// meet twice a row only: when the queries of the next are there, and when dq of the last has been
// stored, of which each warp leaves a part, added up in order.
//
// The sums of dpair_bias stay in registers, as a thread has always the same queries and keys. So does
// the pair bias stay, in shared memory, as a lane needs it: eight logits' at a time.
//
// Defines: as in evoformer_tensor.cuh; WARPS; BLOCK, the keys of each; GROUPS.

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int QUERIES = GROUPS * OWN;
constexpr int CHUNKS = BLOCK / CHUNK;
constexpr int PIECES = HEAD_DIM / 8;    // of 16 bytes, of a row of channels
constexpr int LINE = 2 * PIECES;        // of a key: k, then v
constexpr int WORDS = (BLOCK + 31) / 32;  // of 32 bits, a bit for each key of a warp

using Piece = uint4;

// Where a row s of an operand begins, for this block: an address, but for NUMBER the number of the first
// query, see number_of. In shared memory, for want of registers.
enum Place { OF_Q, OF_K, OF_V, OF_DOUT, OF_OUT, OF_DQ, OF_MASK, OF_MASK_BIAS, NUMBER, PLACES };

struct Places {
    int64 of[4][PLACES], step[PLACES];  // of four rows: the last, this one and the next two
    int64 dpair_bias;
    int tile, part, rows;
    unsigned queries;  // that there are
};

struct Shared {
    uint4 pair_bias[CHUNKS][GROUPS * CHUNK / 8][THREADS];  // of 32 queries and eight keys
    Piece keys[WARPS][BLOCK][LINE];  // see swizzled()
    Row q[2][QUERIES], cotangent[2][QUERIES], out[QUERIES];
    float dq[WARPS][QUERIES][HEAD_DIM];  // a warp's part, see swizzled_dq()
    Query queries[4][QUERIES];
    // Of queries r and r + 8 of each sixteen: −δ as accumulators begin, and shifts.
    float4 minus_delta[2][QUERIES / 16][8];
    float2 shift[2][QUERIES / 16][8];
    // What a logit is besides its product, over scale, as accumulators begin: twice that of two keys.
    float4 starts[WARPS][BLOCK / 2];
    Places places;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");
static_assert(ALIGNED && PAIR_BIAS && !GATED, "elsewhere there are two passes");
static_assert(GROUPS > 1 && M_TILES == 2 && CHUNK == 16 && BLOCK % CHUNK == 0, "a warp does 32 x 16 logits at a time");
static_assert(8 % LINE == 0, "eight rows of keys must lie in different banks");
static_assert(QUERIES <= THREADS, "a thread looks after one query");

using Logits = float[M_TILES][CHUNK / 8][4];
// Whether registers do for the products of sixteen keys at a time.
constexpr bool AHEAD = BLOCK * HEAD_DIM <= 32 * 32;

// Where the piece of a row of keys lies, so that the eight rows that ldmatrix reads at once lie in
// different banks.
__device__ inline int swizzled(int row, int piece) { return piece ^ (row / (8 / LINE) % LINE); }

// The same of eight channels of a query's part of dq.
__device__ inline int swizzled_dq(int row, int piece) { return piece ^ (row / (4 / PIECES) % PIECES); }

// cp_async_wait for a number that is known when loops have been unrolled.
template <int MOST>
__device__ inline void wait_until(int pending) {
    if (pending == MOST)
        cp_async_wait<MOST>();
    else if constexpr (MOST > 0)
        wait_until<MOST - 1>(pending);
}

// Of a warp's 32 queries and eight keys: q · k and ō · v.
struct Products {
    float x[M_TILES][4], dp[M_TILES][4];
};

// Makes them, of the keys that lie so many bytes from those of `by_channels`: x begins with `start`, of
// two keys, and dp with −δ.
__device__ inline void multiply(Products &result, const Fragments &q, const Fragments &cotangent,
                                const SharedAddress (&by_channels)[LINE / 4], int bytes,
                                const float4 &start, const float4 (*minus_delta)[8]) {
    unsigned words[LINE / 4][4];  // fragments of k, then of v
#pragma unroll
    for (int n = 0; n < LINE / 4; ++n) ldmatrix_x4(words[n], here(by_channels[n]) + bytes);
    const float starts[4] = {start.x, start.y, start.z, start.w};
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
        const float4 of = minus_delta[m][0];
        const float deltas[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int at_k = 2 * step, at_v = PIECES + 2 * step;
            const unsigned k[2] = {words[at_k / 4][at_k % 4], words[at_k / 4][at_k % 4 + 1]};
            const unsigned v[2] = {words[at_v / 4][at_v % 4], words[at_v / 4][at_v % 4 + 1]};
            if (step == 0) {
                mma_m16n8k16<Element>(result.x[m], q[m][step], k, starts);
                mma_m16n8k16<Element>(result.dp[m], cotangent[m][step], v, deltas);
            } else {
                mma_m16n8k16<Element>(result.x[m], q[m][step], k);
                mma_m16n8k16<Element>(result.dp[m], cotangent[m][step], v);
            }
        }
    }
}

__device__ inline int64 address(const void *x) {
    return static_cast<int64>(reinterpret_cast<cuda::std::uintptr_t>(x));
}

// Finds the places of the block's first row, at.s.
__device__ inline void find_places(Places &places, const EvoformerArguments &a, const Head &at,
                                   int64 first_query) {
    constexpr int64 size = sizeof(Element);
    const Head group = group_of(a, at);
    int64 *const of = places.of[0], *const step = places.step;
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

// A row of channels, of an operand whose strides from position to position are known to be short.
__device__ inline Element *position(Element *from, int row, const Operand &x) {
    return from + static_cast<int64>(row) * static_cast<int>(x.stride[2]);
}

// Does `work` for each query of which a thread looks after a piece.
template <class Work>
__device__ inline void for_own_queries(unsigned thread, const Work &work) {
    static_assert(THREADS % PIECES == 0, "a thread has the same channels of all its queries");
#pragma unroll
    for (int n = 0; n < (QUERIES * PIECES + THREADS - 1) / THREADS; ++n) {
        const unsigned row = (thread + unknown_zero()) / PIECES + n * (THREADS / PIECES);
        if (QUERIES * PIECES % THREADS == 0 || row < QUERIES) work(row);
    }
}

// Whether one of two numbers is NaN or +inf: beside a dropped key's −inf it would not do.
__device__ inline bool strange(unsigned pair) {
    const float2 x = unpack(pair);
    return !(x.x < infinity()) || !(x.y < infinity());
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    evoformer_tensor_backward_query_pair(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    __shared__ unsigned number;
    const unsigned thread = threadIdx.x, w = thread / 32;

    if (thread == 0)
        number = a.parts > 1 ? atomicAdd(a.turns + a.pair_bias_tiles, 1) : blockIdx.x;
    __syncthreads();
    Blocks block = {number};
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
        places.rows = end - begin;
        places.tile = number % a.pair_bias_tiles, places.part = number / a.pair_bias_tiles;
    }
    const auto next_places = [&](int s) {
        if (thread < PLACES)
            places.of[s & 3][thread] = places.of[(s + 3) & 3][thread] + places.step[thread];
    };
    const auto place = [&](Place which, int s) {
        return reinterpret_cast<Element *>(places.of[s & 3][which]);
    };
    const unsigned own_key = w * BLOCK;  // the warp's first
    // Accumulators begin with biases over scale. One of 0 makes queries 0 instead.
    const bool no_scale = fabsf(a.scale) < 1e-30f;
    const float scale = no_scale ? 1.0f : a.scale;

    // --- The warp's keys: which there are, what they bring to the logits, k and v
    const bool keys_differ = MASK_BIAS || a.mask.data != nullptr;  // from row to row
    struct RawKey {
        unsigned char mask;
        Element bias;
    };
    const auto read_keys = [&](int s, RawKey (&raw)[WORDS]) {
#pragma unroll
        for (int n = 0; n < WORDS; ++n) {
            const unsigned j = 32 * n + lane(), key = own_key + j;
            raw[n].mask = j < BLOCK && key < a.K;
            round_to(0.0f, &raw[n].bias);
            if (raw[n].mask != 0 && MASK_BIAS)
                raw[n].bias = place(OF_MASK_BIAS, s)[key * a.mask_bias.stride[4]];
            if (raw[n].mask != 0 && a.mask.data != nullptr)
                raw[n].mask = *reinterpret_cast<const unsigned char *>(places.of[s & 3][OF_MASK] +
                                                                       key * a.mask.stride[2]);
        }
    };
    using Bits = unsigned[WORDS];
    const auto bits_of = [&](Bits &bits, const RawKey (&raw)[WORDS]) {
#pragma unroll
        for (int n = 0; n < WORDS; ++n) bits[n] = __ballot_sync(ALL_LANES, raw[n].mask != 0);
    };
    const auto write_starts = [&](const Bits &bits, const RawKey (&raw)[WORDS]) {
        const float over = 1.0f / scale;
        __syncwarp();
#pragma unroll
        for (int n = 0; n < WORDS; ++n) {
            const unsigned j = 32 * n + lane();
            float start = MASK_BIAS ? to_float(raw[n].bias) * over : 0.0f;
            if ((bits[n] >> lane() & 1) == 0) start = scale > 0.0f ? -infinity() : infinity();
            float *two = reinterpret_cast<float *>(&shared.starts[w][j / 2]) + j % 2;
            if (BLOCK % 32 == 0 || j < BLOCK) two[0] = two[2] = start;
        }
        __syncwarp();
    };
    // Of sixteen keys, those that are kept; zeros elsewhere: a dropped key may hold NaN (rule EVO-4).
    const auto load_keys = [&](int s, int c, const Bits &bits) {
        constexpr int PASS = 32 / PIECES;
        const int now = lane() + unknown_zero();
        const int lane_row = now / PIECES, lane_piece = now % PIECES;
#pragma unroll
        for (int n = 0; n < CHUNK / PASS; ++n) {
            const int j = CHUNK * c + PASS * n;
            const bool wanted =
                (bits[j / 32] >> (j % 32 + lane_row) & 1) != 0 && 8 * lane_piece < a.D;
            Piece *target = shared.keys[w][j + lane_row];
            const int piece = swizzled(lane_row + PASS * n, lane_piece);
            const int key = own_key + j + lane_row;
            cp_async_16(target + piece,
                        position(place(OF_K, s), key, a.k) + 8 * lane_piece, wanted);
            cp_async_16(target + (piece ^ PIECES),
                        position(place(OF_V, s), key, a.v) + 8 * lane_piece, wanted);
        }
    };
    // Where a lane reads of the warp's first keys, by channels, four pieces at a time, and by keys, two
    // at a time: others are a known distance away.
    SharedAddress by_channels[LINE / 4], by_keys[STEPS];
#pragma unroll
    for (int n = 0; n < LINE / 4; ++n)
        by_channels[n] = shared_address(shared.keys[w][lane() % 8] +
                                        (swizzled(lane() % 8, lane() / 8) ^ 4 * n));
#pragma unroll
    for (int n = 0; n < STEPS; ++n)
        by_keys[n] = shared_address(shared.keys[w][lane() % 16] +
                                    (swizzled(lane() % 16, lane() / 16) ^ 2 * n));
    const float4 *own_starts = shared.starts[w] + lane() % 4;
    constexpr int KEY_BYTES = LINE * sizeof(Piece);

    // --- Queries: what is copied of a row, what is read of it, what is made of both
    const unsigned piece = thread % PIECES * 8;  // the thread's of a row of channels
    const auto load_queries = [&](int s) {
        for_own_queries(thread, [&](unsigned row) {
            const bool wanted = row < places.queries && piece < a.D;
            const auto copy = [&](Row *tile, Place which, const Operand &x) {
                cp_async_16(tile[row] + piece, position(place(which, s), row, x) + piece, wanted);
            };
            copy(shared.q[s & 1], OF_Q, a.q);
            copy(shared.cotangent[s & 1], OF_DOUT, a.dout);
            copy(shared.out, OF_OUT, a.out);
        });
    };
    const auto read_softmax = [&](int s) {
        if (thread >= places.queries) return no_softmax(0.0f);
        return kept_softmax(a, places.of[s & 3][NUMBER] + thread);
    };
    // `shift` has the logarithm of total, so that what is summed is divided by it.
    const auto write_query = [&](int s, const KeptSoftmax &softmax) {
        if (thread >= QUERIES) return;
        // One that is not there is not one without a key, which would be rare.
        Query query = {0.0f, 0.0f, 1.0f, 0.0f};
        const float total = softmax.total();
        if (thread < places.queries) query = finished(softmax.top, total, 0.0f);
        if (total > 0.0f) query.shift += log2f(total);
        shared.queries[s & 3][thread] = query;
        float2 &shift = shared.shift[s & 1][thread / 16][thread % 8];
        (thread / 8 % 2 == 0 ? shift.x : shift.y) = query.shift;
    };
    // δ, of the pieces that this thread itself has loaded; and a query without a key is not looked at.
    const auto prepare = [&](int s) {
        for_own_queries(thread, [&](unsigned row) {
            Query &query = shared.queries[s & 3][row];
            uint4 &cotangent = *reinterpret_cast<uint4 *>(shared.cotangent[s & 1][row] + piece);
            const uint4 dO = cotangent;
            const uint4 O = *reinterpret_cast<const uint4 *>(shared.out[row] + piece);
            float delta = dot(dO, O);
#pragma unroll
            for (int distance = 1; distance < PIECES; distance *= 2)
                delta += __shfl_xor_sync(ALL_LANES, delta, distance);
            if (query.inverse == 0.0f || no_scale) {
                rarely();
                const bool dead = query.inverse == 0.0f;
                Element *q = shared.q[s & 1][row] + piece;
#pragma unroll
                for (int e = 0; e < 8; ++e) round_to(dead ? 0.0f : 0.0f * to_float(q[e]), q + e);
                if (dead) delta = 0.0f, cotangent = uint4{0, 0, 0, 0};
            }
            if (piece == 0) {
                query.delta = delta;
                float4 &start = shared.minus_delta[s & 1][row / 16][row % 8];
                (row / 8 % 2 == 0 ? start.x : start.z) = -delta;
                (row / 8 % 2 == 0 ? start.y : start.w) = -delta;
                if (row < places.queries) a.delta[places.of[s & 3][NUMBER] + row] = delta;
            }
        });
    };
    const bool dq_by_16_bytes = aligned(a.dq);
    const auto store_dq = [&](int s) {
        for_own_queries(thread, [&](unsigned row) {
            if (row >= places.queries || piece >= a.D) return;
            const bool alive = shared.queries[s & 3][row].inverse != 0.0f;
            const int at_piece = 8 * swizzled_dq(row, piece / 8);
            float sum[8] = {};
#pragma unroll
            for (int g = 0; g < WARPS; ++g)
#pragma unroll
                for (int e = 0; e < 8; e += 4) {
                    const float4 x =
                        *reinterpret_cast<const float4 *>(shared.dq[g][row] + at_piece + e);
                    sum[e] += x.x, sum[e + 1] += x.y, sum[e + 2] += x.z, sum[e + 3] += x.w;
                }
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[e] = alive ? sum[e] * a.scale : 0.0f;
            Element *target = place(OF_DQ, s) + row * a.dq.stride[2] + piece * a.dq.stride[4];
            if (dq_by_16_bytes)
                *reinterpret_cast<uint4 *>(target) =
                    uint4{pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]),
                          pack(sum[6], sum[7])};
            else
#pragma unroll
                for (int e = 0; e < 8; ++e) round_to(sum[e], target + e * a.dq.stride[4]);
        });
    };

    // --- The pair bias, and what the first row needs
    bool strange_bias = false;
    {
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
#pragma unroll 1
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int n = 0; n < GROUPS * CHUNK / 8; ++n) {
                const int64 i = first_query + OWN * (n / (CHUNK / 8)) + lane() / 4;
                const int64 j = own_key + CHUNK * c + 8 * (n % (CHUNK / 8)) + 2 * (lane() % 4);
                const uint4 words = {read_bias(i, j), read_bias(i + 8, j), read_bias(i + 16, j),
                                     read_bias(i + 24, j)};
                strange_bias |= strange(words.x) || strange(words.y) || strange(words.z) ||
                                strange(words.w);
                shared.pair_bias[c][n][thread] = words;
            }
    }
    strange_bias = __any_sync(ALL_LANES, strange_bias);
    __syncthreads();
    next_places(1);
    load_queries(0);
    cp_async_commit();
    Bits bits;
    {
        RawKey raw[WORDS];
        read_keys(0, raw);
        bits_of(bits, raw);
        write_starts(bits, raw);
        write_query(0, read_softmax(0));
    }
    cp_async_wait<0>();
    __syncthreads();
    prepare(0);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        load_keys(0, c, bits);
        cp_async_commit();
    }

    float sums[GROUPS][CHUNKS][M_TILES][CHUNK / 8][4] = {};
    int s = 0;  // from the block's first row on
    for (; s < places.rows; ++s) {
        __syncthreads();  // queries are there, and parts of dq
        const bool more = s + 1 < places.rows;
        if (more) load_queries(s + 1);
        cp_async_commit();
        if (s > 0) store_dq(s - 1);
        next_places(s + 2);
        RawKey raw[WORDS];
        KeptSoftmax softmax = {};
        if (more) softmax = read_softmax(s + 1);
        if (more && keys_differ) read_keys(s + 1, raw);
        Bits next = {};

#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            Fragments q, cotangent;
            const int row = OWN * g + lane() % 16, column = lane() / 16 * 8;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    ldmatrix_x4(q[m][step], shared.q[s & 1][row + 16 * m] + column + 16 * step);
                    ldmatrix_x4(cotangent[m][step],
                                shared.cotangent[s & 1][row + 16 * m] + column + 16 * step);
                }
            const Query *queries = shared.queries[s & 3] + OWN * g + lane() / 4;
            bool careful = strange_bias;
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float4 x =
                        *reinterpret_cast<const float4 *>(&queries[16 * m + 8 * half]);
                    careful |= fabsf(x.x) > HUGE_LOGIT;
                    // δ is not finite where ō is not, nor is the sum of weights where q is not.
                    careful |= !(x.z > 0.0f) || !isfinite(x.w);
                }
            careful = __any_sync(ALL_LANES, careful);
            if (g + 1 == GROUPS) {
                if (keys_differ)
                    bits_of(next, raw);
                else
#pragma unroll
                    for (int n = 0; n < WORDS; ++n) next[n] = bits[n];
            }

            // Eight keys at a time: their products are begun before the eight before them are finished,
            // where registers do.
            Result dq = {};
            float unit = FIRST_UNIT;
            Logits x;
            Products products[2];
            const auto begin_eight = [&](int n) {
                const int c = n * 8 / CHUNK;
                if (g == 0 && n % (CHUNK / 8) == 0) {
                    // What is copied after these keys: the queries, and others of this row.
                    wait_until<CHUNKS>(CHUNKS - c);
                    __syncwarp();
                }
                multiply(products[n % 2], q, cotangent, by_channels, 8 * n * KEY_BYTES,
                         own_starts[4 * n], reinterpret_cast<const float4(*)[8]>(
                             &shared.minus_delta[s & 1][M_TILES * g][lane() / 4]));
            };
            begin_eight(0);
#pragma unroll
            for (int n = 0; n < BLOCK / 8; ++n) {
                if (AHEAD && n + 1 < BLOCK / 8) begin_eight(n + 1);
                float (&logit)[M_TILES][4] = products[n % 2].x, (&dp)[M_TILES][4] = products[n % 2].dp;
                const int c = n * 8 / CHUNK, part = n % (CHUNK / 8);
                const uint4 bias = shared.pair_bias[c][CHUNK / 8 * g + part][thread];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 add = unpack(m == 0 ? half == 0 ? bias.x : bias.y
                                                  : half == 0 ? bias.z : bias.w);
                        float *two = &logit[m][2 * half];
                        two[0] = fmaf(two[0], scale, add.x);
                        two[1] = fmaf(two[1], scale, add.y);
                    }
                if (careful) {
                    rarely();
                    const int pair = 2 * (lane() % 4) + unknown_zero();
                    const unsigned kept = bits[8 * n / 32] >> 8 * n % 32;
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const Query &query = queries[16 * m + 8 * (e / 2)];
                            const float p =
                                exponential<true>(logit[m][e], query.top, 0.0f) * query.inverse;
                            const bool counts =
                                query.inverse != 0.0f && (kept >> (pair + e % 2) & 1) != 0;
                            x[m][part][e] = counts ? dp[m][e] * p : 0.0f;
                        }
                } else {
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        const float2 shift = shared.shift[s & 1][M_TILES * g + m][lane() / 4];
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            x[m][part][e] =
                                dp[m][e] *
                                exponential<false>(logit[m][e], 0.0f, e < 2 ? shift.x : shift.y);
                    }
                }
                if (!AHEAD && n + 1 < BLOCK / 8 && part + 1 < CHUNK / 8) begin_eight(n + 1);
                if (part + 1 < CHUNK / 8) continue;

                const float scaled = ELEMENT == 1 ? 1.0f / unit : 1.0f;
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int i = 0; i < CHUNK / 8; ++i)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            sums[g][c][m][i][e] += x[m][i][e];
                            if (ELEMENT == 1) x[m][i][e] *= scaled;
                        }
                keep_in_range(x, unit, dq);
                unsigned left[M_TILES][4];
#pragma unroll
                for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float *pair = &x[m][i / 2][i % 2 * 2];
                        left[m][i] = pack(pair[0], pair[1]);
                    }
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    unsigned k[4];
                    ldmatrix_x4_trans(k, here(by_keys[step]) + CHUNK * c * KEY_BYTES);
                    const unsigned first[2] = {k[0], k[1]}, second[2] = {k[2], k[3]};
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) {
                        mma_m16n8k16<Element>(dq[m][2 * step], left[m], first);
                        mma_m16n8k16<Element>(dq[m][2 * step + 1], left[m], second);
                    }
                }
                if (g + 1 == GROUPS) {
                    __syncwarp();  // nobody reads these keys any more
                    if (more) load_keys(s + 1, c, next);
                    cp_async_commit();
                }
                if (!AHEAD && n + 1 < BLOCK / 8) begin_eight(n + 1);
            }

            if (g == 0) {
                if (more) write_query(s + 1, softmax);
                __syncthreads();  // dq of the last row has been stored
                // All but the keys that have been asked for since.
                cp_async_wait<0>();
                if (more) prepare(s + 1);
            }
            const float by = ELEMENT == 1 ? unit : 1.0f;
            const int now = thread + unknown_zero();  // for want of registers
            float *part = &shared.dq[now / 32][OWN * g + now % 32 / 4][2 * (now % 4)];
            const int swizzle = swizzled_dq(now % 32 / 4, 0);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
#pragma unroll
                    for (int n = 0; n < PIECES; ++n)
                        *reinterpret_cast<float2 *>(part + (16 * m + 8 * half) * HEAD_DIM +
                                                    8 * (n ^ swizzle)) =
                            float2{dq[m][n][2 * half] * by, dq[m][n][2 * half + 1] * by};
                }
        }
        if (more && keys_differ) write_starts(next, raw);
#pragma unroll
        for (int n = 0; n < WORDS; ++n) bits[n] = next[n];
    }
    cp_async_wait<0>();
    __syncthreads();
    store_dq(s - 1);

    // --- dpair_bias
    const int tile = places.tile, part = places.part;
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
    float *whole = a.pair_bias_sums + static_cast<int64>(tile) * (WARPS * BLOCK * QUERIES) + thread;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (int m = 0; m < M_TILES; ++m)
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float sum = sums[g][c][m][n][e];
                        float *place = whole;
                        whole += THREADS;
                        if (part > 0) sum += __ldcg(place);
                        if (!last) *place = sum;
                        const int i = OWN * g + 16 * m + lane() / 4 + 8 * (e / 2);
                        const int j = own_key + CHUNK * c + 8 * n + 2 * (lane() % 4) + e % 2;
                        if (last && i < there && j < a.K)
                            round_to(sum, result + i * out.stride[3] + j * out.stride[4]);
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
