// Evoformer attention on the tensor cores of Hopper, backward: dq.
//
// What `evoformer_tensor_backward_query.cu` computes, with the same logits, by blocks like those of the
// forward (evoformer_warpgroup_forward.cu). What is left of a logit besides three products is to widen its
// pair bias and drop its key, scale and add, shift and exponentiate, which gives the weight, to add −δ to
// what the cotangent makes of v, and to multiply: δ and the softmax's shift are there already
// (evoformer_warpgroup_backward.cuh).
//
// A block does 64 GROUPS queries of one head, of ACROSS rows s, and then others. A team has queries of one
// row, TURNS times 64, and does them one after the other with the same keys. So a tile of the pair bias is
// read once for ACROSS rows, and one of k and v once for all queries of the block. q and the cotangent stay
// in registers for all keys, where those do, and are fetched anew for each tile elsewhere.
//
// All products of a team are its four warps' together: where one of its queries takes care, all do.
//
// Defines, besides those of evoformer_warpgroup.cuh: GROUPS, ACROSS, TURNS; CHUNK, of how many keys
// logits are in registers at a time. BLOCK is 64.

#define TEAMS (GROUPS * ACROSS / TURNS)
#include "evoformer_warpgroup.cuh"
#include "evoformer_warpgroup_backward.cuh"

constexpr int QUERIES = 64 * GROUPS;
constexpr int CHUNKS = BLOCK / CHUNK;
constexpr int LOGIT_TILES = CHUNK / 8;

// Whether q and the cotangent stay in registers: where there are as many besides those of sums, of logits,
// of what is known of queries, and some more.
constexpr bool HELD = TURNS * (HEAD_DIM + 4) + 7 * CHUNK / 4 + 24 <= MORE;

static_assert(BLOCK == 64 && CHUNK >= 32 && GROUPS % TURNS == 0, "teams are alike, and so are their tiles");

using KeyRows = Boxes<BLOCK>;
using QueryRows = Boxes<QUERIES>;
using Left = unsigned[STEPS][4];
using Logits = float[LOGIT_TILES][4];

struct alignas(1024) Stage {
    SwizzledRow pair_bias[QUERIES];
    KeyRows k[ACROSS], v[ACROSS];
    Additions mask[ACROSS];
};

// Where one row s is of: the block's first query.
struct Target {
    Element *dq;
    int64 number;   // of those that the backward keeps
    int queries;    // that there are, 0 if the row is not there
};

struct Shared {
    Stage stage[STAGES];
    QueryRows q[ACROSS], cotangent[ACROSS];
    Halves halves;
    Told told[ACROSS][QUERIES];
    Target target[2][ACROSS];  // of works in turn: the last one's is still read when q is there
    KeptKeys kept[STAGES][ACROSS];
    Signal q_there, q_done, fetched[STAGES], there[STAGES], done[STAGES];
};

// What the kernel is given: the operands, and how the tiles that it fetches lie.
struct Given {
    EvoformerArguments a;
    TileMap q, cotangent, k, v, pair_bias;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

using Work = Place<QUERIES, ACROSS>;

// --- The warps that copy -------------------------------------------------------------------------

// Fetches all that the block multiplies, in the order in which it does: one thread.
__device__ void fetch(const Given &given, Shared &shared) {
    const EvoformerArguments &a = given.a;
    const unsigned last = Work::count(a, a.Q, a.H);
    Turn turn;
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        wait_for(&shared.q_done, 1 - n % 2);
        const Work place(a, a.Q, a.H, work);
        const int query = static_cast<int>(place.first), queries = clamp(a.Q - place.first, 0, QUERIES);
        const int b = static_cast<int>(place.at.b), s = static_cast<int>(place.at.s);
        const int h = static_cast<int>(place.at.h);
#pragma unroll 1
        for (int r = 0; r < ACROSS; ++r)
            shared.target[n % 2][r] = {channels_of(a.dq, place.row(r), place.first),
                                       number_of(a, place.row(r), place.first),
                                       s + r < a.S ? queries : 0};
        arrive_expecting(&shared.q_there, sizeof(shared.q) + sizeof(shared.cotangent));
#pragma unroll 1
        for (int r = 0; r < ACROSS; ++r) {
            fetch_rows(shared.q[r], given.q, query, h, s + r, b, &shared.q_there);
            fetch_rows(shared.cotangent[r], given.cotangent, query, h, s + r, b, &shared.q_there);
        }
        fetch_keys<ACROSS>(given, shared, turn, place);
    }
}

// Tells of all queries and keys, and makes zeros of keys that are dropped, which must not be seen (rule EVO-4).
__device__ void tell(const EvoformerArguments &a, Shared &shared) {
    using Part = Telling<ACROSS>;
    constexpr int EACH = QUERIES / 32;
    const unsigned last = Work::count(a, a.Q, a.H);
    Turn turn;
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        const Work place(a, a.Q, a.H, work);
        Told told[Part::EACH][EACH];
#pragma unroll
        for (int i = 0; i < Part::EACH; ++i) {
            const int r = Part::row(i);
            const bool present = r < ACROSS && place.at.s + r < a.S;
            const int left = present ? clamp(a.Q - place.first, 0, QUERIES) - lane() : 0;
            const Told *next = told_of(a, number_of(a, place.row(r), place.first) + lane());
#pragma unroll
            for (int part = 0; part < EACH; ++part)
                told[i][part] = left > 32 * part ? next[32 * part] : Told{infinity(), 0.0f};
        }
        KeysOfRows<ACROSS> keys;
        keys.start(a, place);
        wait_for(&shared.q_done, 1 - n % 2);
#pragma unroll
        for (int i = 0; i < Part::EACH; ++i)
#pragma unroll
            for (int part = 0; part < EACH; ++part)
                if (Part::row(i) < ACROSS)
                    shared.told[Part::row(i)][lane() + 32 * part] = told[i][part];
        __syncwarp();
        if (lane() == 0) arrive(&shared.q_there);
        keys.tell(a, shared, turn);
    }
}

// --- The warps that multiply ---------------------------------------------------------------------

// Sixteen queries of a warp, of which a lane has two, lane / 4 and lane / 4 + 8.
//
// Where elements are float16, gradients of logits are computed in `unit`s, a power of two, and so is what
// is summed of them; shift has the logarithm of the unit in it.
struct Piece {
    float dq[CHANNEL_TILES][4];  // Σ_j s̄_ij k_j
    float shift[2], minus_delta[2], unit;

    __device__ void start(const Told *told) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Told mine = told[lane() / 4 + 8 * half];
            shift[half] = mine.shift, minus_delta[half] = mine.minus_delta;
            if (ELEMENT == 1) shift[half] += log2f(FIRST_UNIT);
        }
        unit = FIRST_UNIT;
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dq[n][e] = 0.0f;
    }

    __device__ bool dead(int half) const { return shift[half] == infinity(); }

    // Takes a larger unit if one of the gradients does not fit.
    __device__ void keep_in_range(Logits &ds) {
#if ELEMENT == 1
        const float before = unit;
        ::keep_in_range(reinterpret_cast<float(&)[1][LOGIT_TILES][4]>(ds), unit,
                        reinterpret_cast<Result &>(dq));
        if (unit == before) return;
        const float by = log2f(unit / before);
        shift[0] += by, shift[1] += by;
#endif
    }
};

// What a query that takes care needs of its softmax: all 0 where it has no key, or is not there.
__device__ inline Query query_of(const EvoformerArguments &a, int64 number, float shift) {
    if (shift == infinity()) return {0.0f, 0.0f, 0.0f, 0.0f};
    const KeptSoftmax softmax = kept_softmax(a, number);
    return finished(softmax.top, softmax.total(), 0.0f);
}

// Products q · k become weights, of the tile's keys from `first` on; where they are float16, over the unit.
// `number` is that of the first of the warp's sixteen queries, whose rows of the pair bias are those from `row`
// on.
template <bool CAREFUL>
__device__ inline void weigh(Logits &s, const EvoformerArguments &a, const Piece &piece, int64 number,
                             const Stage &stage, int row, int r, const KeptKeys &kept, int first) {
    Query precise[2];
    if (CAREFUL)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            precise[half] = query_of(a, number + lane() / 4 + 8 * half, piece.shift[half]);
    const SwizzledRow &pair_bias = stage.pair_bias[row + lane() % 16];
#pragma unroll
    for (int n = 0; n < LOGIT_TILES; n += 2) {
        unsigned bias[4];  // rows, rows + 8; then the next eight keys
        ldmatrix_x4(bias, pair_bias.piece(first / 8 + n + lane() / 16, lane()));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = first + 8 * (n + i) + 2 * (lane() % 4);
            float2 mask_bias = {};
            if (MASK_BIAS)
                mask_bias = unpack(*reinterpret_cast<const unsigned *>(stage.mask[r].of(key)));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 add = unpack(bias[2 * i + half]);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &one = s[n + i][2 * half + e];
                    const float plus = e == 0 ? add.x : add.y;
                    if (MASK_BIAS)  // logits: rule EVO-2
                        one = fmaf(one, a.scale, e == 0 ? mask_bias.x : mask_bias.y) + plus;
                    else
                        one = fmaf(one, a.scale, plus);
                    if (CAREFUL) {  // beside a query that is not finite, −inf became NaN
                        const Query &query = precise[half];
                        if (!kept(key + e)) one = -infinity();
                        one = exponential<true>(one, query.top, query.shift) * query.inverse;
                        if (ELEMENT == 1) one /= piece.unit;
                    } else
                        one = exp2_approximate(fmaf(one, LOG2_E, -piece.shift[half]));
                }
            }
        }
    }
}

// Weights of keys of which none is kept.
__device__ inline void nothing(Logits &s) {
#pragma unroll
    for (int n = 0; n < LOGIT_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
}

// Weights become the gradients of logits, given dp = ō · v: those of dropped keys 0, as the weights, or
// NaN like all of their query's.
__device__ inline void differentiate(Logits &s, const Logits &dp, const Piece &piece) {
#pragma unroll
    for (int n = 0; n < LOGIT_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= dp[n][e] + piece.minus_delta[e / 2];
}

// Writes the warp's queries from `query` of the block on.
__device__ inline void finish(const EvoformerArguments &a, const Piece &piece, const Target &target,
                              int query, bool by_pairs) {
    const float scale = ELEMENT == 1 ? a.scale * piece.unit : a.scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool alive = !piece.dead(half);
        const int i = query + lane() / 4 + 8 * half + unknown_zero();
        if (i >= target.queries) continue;
        store_row(a, a.dq, target.dq + i * a.dq.stride[2], by_pairs, [&](int n, int e) {
            return alive ? piece.dq[n][2 * half + e] * scale : 0.0f;
        });
    }
}

// What a warp works at: queries of one row s, for each of its team's turns sixteen.
struct Own {
    int r, query;  // of the block: the row s, and the first query of the first turn
    Piece pieces[TURNS];
    Left q[HELD ? TURNS : 1], cotangent[HELD ? TURNS : 1];

    // Begins with the queries that have come. Where in shared memory they are is found out each time, and
    // does not stay in registers.
    __device__ void start(const Shared &shared) {
        const int mine = query + unknown_zero();
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
            pieces[turn].start(shared.told[r] + mine + 64 * turn);
            if (!HELD) continue;
            load_left(q[turn], shared.q[r], mine + 64 * turn);
            load_left(cotangent[turn], shared.cotangent[r], mine + 64 * turn);
        }
    }

    // Adds a tile of keys to dq. `number` is that of the block's first query, of those that the backward keeps.
    //
    // Chunks are numbered: all of a turn's, then the next turn's. Products are under way while others are
    // looked at: those of q and the next chunk's keys all the time; those of the cotangent, and of the
    // chunk before with k, while the chunk's weights are computed.
    template <bool CAREFUL>
    __device__ void add(const EvoformerArguments &a, const Shared &shared, const Stage &stage,
                        const KeptKeys &kept, int64 number) {
        constexpr int LAST = TURNS * CHUNKS - 1;
        Logits s[2], dp;
        const auto begin_logits = [&](int chunk) {
            const int turn = chunk / CHUNKS;
            if (!HELD && chunk % CHUNKS == 0) load_left(q[0], shared.q[r], query + 64 * turn);
            warpgroup_begin();
            multiply_rows(s[chunk % 2], q[HELD ? turn : 0], stage.k[r], chunk % CHUNKS * CHUNK);
            if (!MASK_BIAS)
                add_to_columns(s[chunk % 2], shared.halves, stage.mask[r], chunk % CHUNKS * CHUNK);
            warpgroup_commit();
        };
        const auto begin_changes = [&](int chunk) {
            multiply_rows(dp, cotangent[HELD ? chunk / CHUNKS : 0], stage.v[r],
                          chunk % CHUNKS * CHUNK);
        };
        if (!HELD) load_left(cotangent[0], shared.cotangent[r], query);
        begin_logits(0);
        warpgroup_begin();
        begin_changes(0);
        warpgroup_commit();
#pragma unroll
        for (int chunk = 0; chunk <= LAST; ++chunk) {
            const int turn = chunk / CHUNKS, first = chunk % CHUNKS * CHUNK;
            Piece &piece = pieces[turn];
            Logits &mine = s[chunk % 2];
            if (chunk < LAST) {
                begin_logits(chunk + 1);
                warpgroup_wait<2>();
            } else
                warpgroup_wait<1>();
            warpgroup_results(mine);
            // Where no key is kept, nothing is added. Without a branch here, the assembler would wait for dp
            // before all weights are computed, instead of after.
            if (CHUNK == 64 || kept.word[first / 32] != 0)
                weigh<CAREFUL>(mine, a, piece, number + query + 64 * turn, stage, query + 64 * turn, r,
                               kept, first);
            else
                nothing(mine);
            if (chunk < LAST)
                warpgroup_wait<1>();
            else
                warpgroup_wait();
            warpgroup_results(dp);
            differentiate(mine, dp, piece);
            piece.keep_in_range(mine);
            unsigned gradients[CHUNK / 16][4];
#pragma unroll
            for (int n = 0; n < LOGIT_TILES; ++n)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    gradients[n / 2][n % 2 * 2 + half] =
                        pack(mine[n][2 * half], mine[n][2 * half + 1]);
            if (!HELD && turn < TURNS - 1 && first + CHUNK == BLOCK)
                load_left(cotangent[0], shared.cotangent[r], query + 64 * (turn + 1));
            warpgroup_begin();
            multiply_columns(piece.dq, gradients, stage.k[r], first);
            if (chunk < LAST) begin_changes(chunk + 1);
            warpgroup_commit();
        }
        warpgroup_wait();
    }

    // Adds all keys.
    template <bool CAREFUL>
    __device__ void add_all(const EvoformerArguments &a, Shared &shared, Turn &turn, int64 number) {
        for (int left = static_cast<int>(a.K); left > 0; left -= BLOCK, ++turn.count) {
            const Stage &stage = shared.stage[uniform(turn.stage())];
            wait_for(&shared.there[turn.stage()], turn.phase());
            __syncwarp();
            const KeptKeys &kept = shared.kept[turn.stage()][r];
            if (kept.any()) add<CAREFUL>(a, shared, stage, kept, number);
            __syncwarp();
            if (lane() == 0) arrive(&shared.done[turn.stage()]);
        }
    }
};

// Whether any of a team's queries takes care: all its warps find the same.
__device__ inline bool any_careful(const Told *told) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < 64 * TURNS; i += 32)
        found |= told[i + lane() + unknown_zero()].careful();
    return __any_sync(ALL_LANES, found);
}

__device__ void multiply(const EvoformerArguments &a, Shared &shared) {
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32), team = warp / 4;
    const int first = team / ACROSS * TURNS * 64;  // the team's first query in the block
    Own own;
    own.r = team % ACROSS, own.query = first + warp % 4 * 16;
    const bool by_pairs = in_pairs(a.dq);
    const unsigned last = Work::count(a, a.Q, a.H);
    Turn turn;
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        const auto release = [&] {
            __syncwarp();
            if (lane() == 0) arrive(&shared.q_done);
        };
        wait_for(&shared.q_there, n % 2);
        __syncwarp();
        const bool careful = any_careful(shared.told[own.r] + first) || a.scale == 0.0f;
        own.start(shared);
        if (HELD) release();
        const Target &target = shared.target[n % 2][own.r];
        if (careful) {
            rarely();
            own.add_all<true>(a, shared, turn, target.number);
        } else
            own.add_all<false>(a, shared, turn, 0);
        if (!HELD) release();
#pragma unroll
        for (int u = 0; u < TURNS; ++u)
            finish(a, own.pieces[u], target, own.query + 64 * u, by_pairs);
    }
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_backward_query(const __grid_constant__ Given given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    shared.halves.make();
    for (int i = 0; i < STAGES; ++i)
        for (int r = 0; r < ACROSS; ++r) shared.stage[i].mask[r].make();
    if (threadIdx.x == 0) {
        expect(&shared.q_there, 1 + Telling<ACROSS>::TELLERS), expect(&shared.q_done, MULTIPLYING / 32);
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
