// Evoformer attention on the tensor cores of Hopper, backward: dk and dv, and the parts of dmask_bias.
//
// What `evoformer_tensor_backward_key.cu` computes, with the same logits, where a logit is to cost few
// instructions. The rows of the products are keys: a team has 64 of one row s, as left operands in
// registers, and sums for them; the queries of all heads of the group stream by. Of Sᵀ = K Qᵀ and
// dPᵀ = V Ōᵀ it has CHUNK queries at a time, whose Pᵀ and dSᵀ are, rounded, the left operands of the sums
// over queries. What begins with −δ need not subtract it.
//
// A block does GROUPS teams of keys of one key/value head, of ACROSS rows s, which share the tiles of the
// pair bias, and then others.
//
// Defines: as in evoformer_warpgroup.cuh, and GROUPS, ACROSS; BLOCK, of queries, is 64.

#define TEAMS (GROUPS * ACROSS)
#include "evoformer_mask_bias.cuh"
#include "evoformer_warpgroup.cuh"
#include "evoformer_warpgroup_backward.cuh"

constexpr int KEYS = 64 * GROUPS;

static_assert(BLOCK == 64, "two queries a lane of those that copy");
static_assert(STAGES > 1, "a tile is released when the next has begun");

using KeyRows = Boxes<KEYS>;
using QueryRows = Boxes<BLOCK>;

// What a tile of queries brings besides q and ō, as all lanes need it.
struct alignas(16) Queries {
    float shift[BLOCK];
    float4 minus_delta[BLOCK / 2];  // of two queries, twice, as accumulators begin
    uint2 any_careful, unused;      // whether one has a key; whether one takes care
};

struct alignas(1024) Stage {
    SwizzledRow pair_bias[GROUPS][BLOCK];
    QueryRows q[ACROSS], cotangent[ACROSS];
    Queries queries[ACROSS];
};

struct Shared {
    Stage stage[STAGES];
    KeyRows k[ACROSS], v[ACROSS];
    Signal keys_fetched, keys_there, keys_done, fetched[STAGES], there[STAGES], done[STAGES];
};

// What the kernel is given: the operands, and how the tiles that it fetches lie.
struct Given {
    EvoformerArguments a;
    TileMap k, v, q, cotangent, pair_bias;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

using Work = Place<KEYS, ACROSS>;  // of key/value heads

// --- The warps that copy -------------------------------------------------------------------------

// Fetches all that the block multiplies, in the order in which it does: one thread.
__device__ void fetch(const Given &given, Shared &shared) {
    const EvoformerArguments &a = given.a;
    const int heads = static_cast<int>(a.H / a.G), queries = static_cast<int>(a.Q);
    const unsigned last = Work::count(a, a.K, a.G);
    Turn turn;
    unsigned phase = 0;
    for (unsigned work = blockIdx.x; work < last; work += gridDim.x, phase ^= 1) {
        const Work place(a, a.K, a.G, work);
        const int b = static_cast<int>(place.at.b), s = static_cast<int>(place.at.s);
        const int g = static_cast<int>(place.at.h), key = static_cast<int>(place.first);
        wait_for(&shared.keys_done, 1 - phase);
        arrive_expecting(&shared.keys_fetched, sizeof(shared.k) + sizeof(shared.v));
#pragma unroll 1
        for (int r = 0; r < ACROSS; ++r) {
            fetch_rows(shared.k[r], given.k, key, g, s + r, b, &shared.keys_fetched);
            fetch_rows(shared.v[r], given.v, key, g, s + r, b, &shared.keys_fetched);
        }
#pragma unroll 1
        for (int h = g * heads; h < (g + 1) * heads; ++h)
#pragma unroll 1
            for (int query = 0; query < queries; query += BLOCK, ++turn.count) {
                Stage &stage = shared.stage[turn.stage()];
                Signal *fetched = &shared.fetched[turn.stage()];
                wait_for(&shared.done[turn.stage()], 1 - turn.phase());
                arrive_expecting(fetched, sizeof(stage.pair_bias) + sizeof(stage.q) +
                                              sizeof(stage.cotangent));
#pragma unroll
                for (int i = 0; i < GROUPS; ++i)
                    fetch_tile(stage.pair_bias[i], given.pair_bias, key + 64 * i, query, h, 0, b,
                               fetched);
#pragma unroll 1
                for (int r = 0; r < ACROSS; ++r) {
                    fetch_rows(stage.q[r], given.q, query, h, s + r, b, fetched);
                    fetch_rows(stage.cotangent[r], given.cotangent, query, h, s + r, b, fetched);
                }
            }
    }
}

// Tells of the queries, and makes zeros of keys that are dropped and of queries without a key, which must not
// be seen (rules EVO-4 and EVO-5).
__device__ void tell(const EvoformerArguments &a, Shared &shared) {
    using Part = Telling<ACROSS>;
    constexpr int ROWS_EACH = Part::EACH;
    const int heads = static_cast<int>(a.H / a.G);
    const unsigned last = Work::count(a, a.K, a.G);
    Turn turn;
    unsigned phase = 0;
    for (unsigned work = blockIdx.x; work < last; work += gridDim.x, phase ^= 1) {
        const Work place(a, a.K, a.G, work);
        const auto present = [&](int i) {
            return Part::row(i) < ACROSS && place.at.s + Part::row(i) < a.S;
        };
        wait_for(&shared.keys_fetched, phase);
#pragma unroll
        for (int i = 0; i < ROWS_EACH; ++i) {
            const int r = Part::row(i);
            if (present(i))
#pragma unroll 1
                for (int j = lane(); j < KEYS; j += 32)
                    if (!kept(a, place.row(r), place.first + j))
                        shared.k[r].clear(j), shared.v[r].clear(j);
        }
        is_told(&shared.keys_there);

#pragma unroll 1
        for (int h = 0; h < heads; ++h) {
            const Head at = {place.at.b, place.at.s + Part::row(0), place.at.h * heads + h};
            const Told *next = told_of(a, number_of(a, at, lane()));
            Told ahead[ROWS_EACH][2];  // of the lane's two queries of the next tile
            const auto read = [&](int left) {
#pragma unroll
                for (int i = 0; i < ROWS_EACH; ++i)
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        ahead[i][part] = present(i) && left > 32 * part
                                            ? next[i * Part::TELLERS * a.H * a.Q + 32 * part]
                                            : Told{infinity(), 0.0f};
                next += BLOCK;
            };
            read(static_cast<int>(a.Q) - lane());
#pragma unroll 1
            for (int left = static_cast<int>(a.Q); left > 0; left -= BLOCK, ++turn.count) {
                Stage &stage = shared.stage[turn.stage()];
                wait_for(&shared.done[turn.stage()], 1 - turn.phase());
                bool dead[ROWS_EACH][2];
#pragma unroll
                for (int i = 0; i < ROWS_EACH; ++i) {
                    const int r = Part::row(i);
                    if (r >= ACROSS) break;
                    Queries &of = stage.queries[r];
                    bool careful = false;
#pragma unroll
                    for (int part = 0; part < 2; ++part) {
                        const Told &one = ahead[i][part];
                        dead[i][part] = one.dead(), careful |= one.careful();
                        const int j = lane() + 32 * part;
                        of.shift[j] = one.shift;
                        float *start = reinterpret_cast<float *>(&of.minus_delta[j / 2]) + j % 2;
                        start[0] = start[2] = one.minus_delta;
                    }
                    const bool any = __any_sync(ALL_LANES, !(dead[i][0] && dead[i][1]));
                    careful = __any_sync(ALL_LANES, careful);
                    if (lane() == 0) of.any_careful = {any, careful};
                }
                read(left - BLOCK - lane());  // and until the next tile it has come
                wait_for(&shared.fetched[turn.stage()], turn.phase());
#pragma unroll
                for (int i = 0; i < ROWS_EACH; ++i) {
                    const int r = Part::row(i);
                    if (r >= ACROSS) break;
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        if (dead[i][part])
                            stage.q[r].clear(lane() + 32 * part),
                                stage.cotangent[r].clear(lane() + 32 * part);
                }
                is_told(&shared.there[turn.stage()]);
            }
        }
    }
}

// --- The warps that multiply ---------------------------------------------------------------------

using Logits = float[CHUNK / 8][4];

// Whether sums may be under way while the next logits are. Where they may change their unit, the assembler
// does not see that they are not under way then.
constexpr bool LATE = ELEMENT == 2;

// What a warp has of its sixteen keys of one row s, and sums for them: of lane / 4 and lane / 4 + 8.
struct Own {
    unsigned k[STEPS][4], v[STEPS][4];
    float bias[2];  // the mask bias
    float dk[CHANNEL_TILES][4], dv[CHANNEL_TILES][4];
    float dmask_bias[2], unit;

    __device__ void start() {
        dmask_bias[0] = dmask_bias[1] = 0.0f, unit = FIRST_UNIT;
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dk[n][e] = dv[n][e] = 0.0f;
    }

    // Adds a tile of queries, of which the first has the `number`, and where the warp's keys have the pair
    // bias from `column` on; `dp` is as its products begin. When the sums that were under way are done,
    // `before` is called; those of the last chunk are under way at the end.
    //
    // What is in shared memory is fetched while products are under way, which is not seen by the compiler.
    template <bool CAREFUL, class Before>
    __device__ void add(const EvoformerArguments &a, const QueryRows &q, const QueryRows &cotangent,
                        const SwizzledRow *pair_bias, int column, const Queries &queries, Logits &dp,
                        int64 number, const Before &before) {
        Logits s;
#pragma unroll
        for (int first = 0; first < BLOCK; first += CHUNK) {
            warpgroup_begin();
            multiply_rows(s, k, q, first);
            multiply_rows(dp, v, cotangent, first, true);
            warpgroup_commit();
            if (LATE) warpgroup_wait<1>();
            if (first == 0) before();
            unsigned biases[CHUNK / 16][4];
            float2 shifts[CHUNK / 8];
            fetch_biases(biases, pair_bias + first, column);
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
                shifts[n] = *reinterpret_cast<const float2 *>(queries.shift + first + 8 * n +
                                                              2 * (lane() % 4));
            warpgroup_wait();
            warpgroup_results(s), warpgroup_results(dp);
            add_biases(s, biases, a.scale);
            unsigned weights[CHUNK / 16][4];
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n) {
                const int j = first + 8 * n + 2 * (lane() % 4);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float at = e % 2 == 0 ? shifts[n].x : shifts[n].y;
                    if (!CAREFUL)
                        s[n][e] = exponential<false>(s[n][e], 0.0f, at);
                    else
                        s[n][e] = at == infinity()
                                      ? 0.0f
                                      : weight_carefully(a, number + j + e % 2, s[n][e]);
                    dp[n][e] *= s[n][e];
                }
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    weights[n / 2][n % 2 * 2 + half] = pack(s[n][2 * half], s[n][2 * half + 1]);
            }
            if (MASK_BIAS) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float sum = 0.0f;  // by itself: shorter sums round less
#pragma unroll
                    for (int n = 0; n < CHUNK / 8; ++n) {
                        sum += dp[n][2 * half];
                        sum += dp[n][2 * half + 1];
                    }
                    dmask_bias[half] += sum;
                }
            }
            in_units(dp);
            unsigned gradients[CHUNK / 16][4];
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    gradients[n / 2][n % 2 * 2 + half] = pack(dp[n][2 * half], dp[n][2 * half + 1]);
            if (first + CHUNK < BLOCK) begin(dp, queries, first + CHUNK);
            warpgroup_begin();
            multiply_columns(dv, weights, cotangent, first);
            multiply_columns(dk, gradients, q, first);
            warpgroup_commit();
            if (!LATE) warpgroup_wait(), warpgroup_results(dk), warpgroup_results(dv);
        }
    }

    // Products with the cotangent begin with −δ, of queries from `first` on.
    __device__ static void begin(Logits &dp, const Queries &queries, int first) {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const float4 x = queries.minus_delta[first / 2 + 4 * n + lane() % 4];
            dp[n][0] = x.x, dp[n][1] = x.y, dp[n][2] = x.z, dp[n][3] = x.w;
        }
    }

    // Of sixteen queries each: of keys, keys + 8; then of the next eight queries.
    __device__ static void fetch_biases(unsigned (&biases)[CHUNK / 16][4], const SwizzledRow *pair_bias,
                                        int column) {
#pragma unroll
        for (int n = 0; n < CHUNK / 16; ++n)
            ldmatrix_x4_trans(biases[n], pair_bias[16 * n + lane() % 8 + 8 * (lane() / 16)].piece(
                                             column / 8 + lane() / 8 % 2, lane()));
    }

    // Products become logits (rule EVO-2), whatever those of a dropped key: its sums are not looked at.
    __device__ void add_biases(Logits &s, const unsigned (&biases)[CHUNK / 16][4], float scale) const {
#pragma unroll
        for (int n = 0; n < CHUNK / 16; ++n)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                float *logit = &s[2 * n + part / 2][part % 2 * 2];
                const float2 add = unpack(biases[n][part]);
                if (MASK_BIAS) {
                    logit[0] = fmaf(logit[0], scale, bias[part % 2]) + add.x;
                    logit[1] = fmaf(logit[1], scale, bias[part % 2]) + add.y;
                } else {
                    logit[0] = fmaf(logit[0], scale, add.x);
                    logit[1] = fmaf(logit[1], scale, add.y);
                }
            }
    }

    // Gradients of logits as float16 can hold them.
    __device__ void in_units(Logits &dp) {
#if ELEMENT == 1
        const float by = 1.0f / unit;
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dp[n][e] *= by;
        keep_in_range(reinterpret_cast<float(&)[1][CHUNK / 8][4]>(dp), unit,
                      reinterpret_cast<Result &>(dk));
#endif
    }
};

// Writes the warp's rows of a gradient, of key `first` and from there on, with zeros in those that are
// not alive.
__device__ inline void store(const EvoformerArguments &a, const Operand &x, const Head &at,
                             int64 first, const float (&sum)[CHANNEL_TILES][4], float scale,
                             const bool (&alive)[2]) {
    const bool by_pairs = in_pairs(x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64 j = first + lane() / 4 + 8 * half;
        if (j < a.K)
            store_row(a, x, channels_of(x, at, j), by_pairs, [&](int n, int e) {
                return alive[half] ? sum[n][2 * half + e] * scale : 0.0f;
            });
    }
}

__device__ inline void multiply(const EvoformerArguments &a, Shared &shared) {
    const int team = uniform(static_cast<int>(threadIdx.x) / 128), r = team / GROUPS;
    const int own = team % GROUPS * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    const int tiles = tiles_of(a.Q, BLOCK), all = tiles * static_cast<int>(a.H / a.G);
    const unsigned last = Work::count(a, a.K, a.G);
    Turn turn;
    unsigned phase = 0;
    for (unsigned work = blockIdx.x; work < last; work += gridDim.x, phase ^= 1) {
        const Work place(a, a.K, a.G, work);
        const Head at = place.row(r);
        const bool present = at.s < a.S;
        Own sums;
        sums.start();
        bool alive[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64 j = place.first + own + lane() / 4 + 8 * half;
            alive[half] = present && kept(a, at, j);
            sums.bias[half] = alive[half] ? mask_bias_of(a, at, j) : -infinity();
        }
        wait_for(&shared.keys_there, phase);
        __syncwarp();
        load_left(sums.k, shared.k[r], own);
        load_left(sums.v, shared.v[r], own);
        __syncwarp();
        if (lane() == 0) arrive(&shared.keys_done);

        Signal *used = nullptr;  // of the tile before, of which sums may be under way
        const auto release = [&] {
            __syncwarp();
            if (used != nullptr && lane() == 0) arrive(used);
            used = nullptr;
        };
        for (int t = 0; t < all; ++t, ++turn.count) {
            const Stage &stage = shared.stage[uniform(turn.stage())];
            wait_for(&shared.there[turn.stage()], turn.phase());
            __syncwarp();
            const Queries &queries = stage.queries[r];
            const SwizzledRow *pair_bias = stage.pair_bias[team % GROUPS];
            const uint2 any_careful = queries.any_careful;
            Logits dp;  // read with that, needed or not
            Own::begin(dp, queries, 0);
            if (any_careful.x != 0) {
                if (any_careful.y != 0) {
                    rarely();
                    const Head head = {at.b, at.s, at.h * (a.H / a.G) + t / tiles};
                    sums.add<true>(a, stage.q[r], stage.cotangent[r], pair_bias, own % 64, queries, dp,
                                   number_of(a, head, t % tiles * BLOCK), release);
                } else
                    sums.add<false>(a, stage.q[r], stage.cotangent[r], pair_bias, own % 64, queries, dp,
                                    0, release);
            } else {
                warpgroup_wait();
                release();
            }
            used = &shared.done[turn.stage()];
        }
        warpgroup_wait();
        warpgroup_results(sums.dk), warpgroup_results(sums.dv);
        release();
        if (!present) continue;

        if (a.mask_bias_parts != nullptr) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = over_row(sums.dmask_bias[half]);
                const int64 j = place.first + own + lane() / 4 + 8 * half;
                if (j < a.K && lane() % 4 == 0)
                    a.mask_bias_parts[((at.b * a.S + at.s) * a.G + at.h) * a.K + j] =
                        alive[half] ? sum : 0.0f;
            }
        }
        if (a.dk.data != nullptr)
            store(a, a.dk, at, place.first + own, sums.dk,
                  ELEMENT == 1 ? a.scale * sums.unit : a.scale, alive);
        if (a.dv.data != nullptr) store(a, a.dv, at, place.first + own, sums.dv, 1.0f, alive);
    }
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_backward_key(const __grid_constant__ Given given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);

    if (threadIdx.x == 0) {
        expect(&shared.keys_fetched, 1), expect(&shared.keys_there, Telling<ACROSS>::TELLERS);
        expect(&shared.keys_done, MULTIPLYING / 32);
        expect_stages(shared, Telling<ACROSS>::TELLERS, MULTIPLYING / 32);
    }
    shared_for_warpgroups();
    __syncthreads();

    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        if (copier() == 0)
            fetch(given, shared);
        else if (Telling<ACROSS>::is_one())
            tell(given.a, shared);
    } else {
        take_more_registers<MORE>();
        multiply(given.a, shared);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    evoformer_warpgroup_backward_mask_bias(const EvoformerArguments a) {
    add_up_mask_bias(a);
}
