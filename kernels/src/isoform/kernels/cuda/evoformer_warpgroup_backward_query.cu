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

using KeyRows = Columns<BLOCK>;
using QueryRows = Columns<QUERIES>;
using Left = unsigned[STEPS][4];
using Logits = float[LOGIT_TILES][4];

// What a tile of keys brings to the logits of a row s besides k, as in KeyTile; each key at its place_of().
struct alignas(16) RowKeys {
    unsigned choice[BLOCK];
    float bias[MASK_BIAS ? BLOCK : 4];
    unsigned kept, unused[3];  // a byte for sixteen keys: whether any is
};

// Of sixteen keys, the four that a lane has logits of are neighbours.
__device__ inline int place_of(int j) { return j / 16 * 16 + j % 8 / 2 * 4 + j / 8 % 2 * 2 + j % 2; }

struct Stage {
    KeyRows k[ACROSS], v[ACROSS];
    BiasRow pair_bias[QUERIES];
    RowKeys keys[ACROSS];
};

// Where one row s is of: the block's first query.
struct Target {
    Element *dq;
    int64 number;   // of those that the backward keeps
    int queries;    // that there are, 0 if the row is not there
};

struct Shared {
    QueryRows q[ACROSS], cotangent[ACROSS];
    Told told[ACROSS][QUERIES];
    Target target[2][ACROSS];  // of works in turn: the last one's is still read when q is there
    Stage stage[STAGES];
    Signal q_there, q_done, there[STAGES], done[STAGES];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

using Work = Place<QUERIES, ACROSS>;

// --- The warps that copy -------------------------------------------------------------------------
//
// Each of the four copies a quarter of everything, which is little to compute: what they issue, the others
// of the same scheduler do not. Where a thread's pieces are in shared memory the compiler knows but for the
// stage; where they come from is known from the piece before.

__device__ inline bool has_queries(const EvoformerArguments &a, const Work &place, int r) {
    return place.at.s + r < a.S;
}

// Copies q and the cotangent, and what is known of the queries.
__device__ inline void copy_queries(const EvoformerArguments &a, Shared &shared, const Work &place,
                                    int queries, Target *target) {
    constexpr int EACH = (QUERIES + COPYING - 1) / COPYING;
    const int64 number = number_of(a, place.at, place.first), to_next = a.H * a.Q;
    Told told[ACROSS][EACH];
#pragma unroll
    for (int r = 0; r < ACROSS; ++r)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int query = copier() + i * COPYING;
            told[r][i] = {infinity(), 0.0f};
            if (query < queries && has_queries(a, place, r))
                told[r][i] = *told_of(a, number + r * to_next + query);
        }

    const RowCopier<COPYING> part(a, copier());
    constexpr int AT_ONCE = RowCopier<COPYING>::AT_ONCE;
    const Element *q = part.first(channels_of(a.q, place.at, place.first), a.q.stride[2]);
    const Element *cotangent =
        part.first(channels_of(a.dout, place.at, place.first), a.dout.stride[2]);
    const auto copy = [&](QueryRows &to, const Element *from, int64 stride) {
#pragma unroll
        for (int i = 0; i < QUERIES; i += AT_ONCE) {
            cp_async_16(&to.piece[part.piece][part.row + i], from,
                        part.there && part.row + i < queries);
            from += AT_ONCE * stride;
        }
    };
#pragma unroll 1
    for (int r = 0; r < ACROSS && has_queries(a, place, r); ++r) {
        if (part.row < AT_ONCE) {
            copy(shared.q[r], q, a.q.stride[2]);
            copy(shared.cotangent[r], cotangent, a.dout.stride[2]);
        }
        q += a.q.stride[1], cotangent += a.dout.stride[1];
    }
#pragma unroll
    for (int r = 0; r < ACROSS; ++r) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (copier() + i * COPYING < QUERIES)
                shared.told[r][copier() + i * COPYING] = told[r][i];
        if (copier() == r)
            target[r] = {channels_of(a.dq, place.row(r), place.first), number + r * to_next,
                         has_queries(a, place, r) ? queries : 0};
    }
}

// A thread's part in copying the pair bias, tile after tile.
struct PairBiases {
    static constexpr int PER_ROW = BLOCK / 8, AT_ONCE = COPYING / PER_ROW;

    int row = copier() / PER_ROW, column = copier() % PER_ROW * 8;
    const Element *next;
    int queries;

    __device__ void start(const EvoformerArguments &a, const Work &place, int present) {
        const Operand &x = a.pair_bias;
        next = static_cast<const Element *>(x.data) + place.at.b * x.stride[0] +
               place.at.h * x.stride[2] + (place.first + row) * x.stride[3] + column;
        queries = present;
    }

    // Zeros beyond the queries, and beyond the keys, of which there are `left`.
    __device__ void copy(const EvoformerArguments &a, BiasRow *tile, int left) {
        const int64 step = AT_ONCE * a.pair_bias.stride[3];
        const Element *from = next;
        if (queries == QUERIES && left >= BLOCK) {
#pragma unroll
            for (int i = 0; i < QUERIES; i += AT_ONCE, from += step)
                cp_async_16(tile[row + i] + column, from);
        } else {
#pragma unroll 1
            for (int i = 0; i < QUERIES; i += AT_ONCE, from += step)
                cp_async_16(tile[row + i] + column, from, row + i < queries && column < left);
        }
        next += BLOCK;
    }
};

// A lane's part in copying k and v, tile after tile: the warp has sixteen of the keys, and the lane looks
// whether one of them is kept, of every second row s.
struct KeyRowsOf {
    using Part = RowCopier<32>;
    static constexpr int AT_ONCE = Part::AT_ONCE, PAIRS = (ACROSS + 1) / 2;

    Part part;
    int first, own;  // the warp's first key of a tile, and the lane's
    const Element *k, *v, *bias;
    const unsigned char *mask;
    int rows, left;  // that there are, from the lane's on
    KeyStream::Raw raw[PAIRS];  // of the next tile

    __device__ explicit KeyRowsOf(const EvoformerArguments &a)
        : part(a, lane()), first(copier() / 32 * 16), own(first + lane() % 16) {}

    __device__ void start(const EvoformerArguments &a, const Work &place, int64 group) {
        const Head at = {place.at.b, place.at.s, group};
        k = part.first(channels_of(a.k, at, first), a.k.stride[2]);
        v = part.first(channels_of(a.v, at, first), a.v.stride[2]);
        const int64 row = at.s + lane() / 16;
        if (a.mask.data != nullptr)
            mask = static_cast<const unsigned char *>(a.mask.data) + at.b * a.mask.stride[0] +
                   row * a.mask.stride[1] + own * a.mask.stride[2];
        if (MASK_BIAS)
            bias = static_cast<const Element *>(a.mask_bias.data) + at.b * a.mask_bias.stride[0] +
                   row * a.mask_bias.stride[1] + own * a.mask_bias.stride[4];
        rows = clamp(a.S - row, 0, ACROSS - lane() / 16), left = static_cast<int>(a.K) - own;
        read(a);
    }

    // What is known of the next tile's keys.
    __device__ void read(const EvoformerArguments &a) {
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
            const bool there = 2 * p < rows && left > 0;
            raw[p].mask = there;
            if (there && a.mask.data != nullptr) raw[p].mask = mask[2 * p * a.mask.stride[1]];
            round_to(0.0f, &raw[p].bias);
            if (MASK_BIAS && there) raw[p].bias = bias[2 * p * a.mask_bias.stride[1]];
        }
        left -= BLOCK;
        if (a.mask.data != nullptr) mask += BLOCK * a.mask.stride[2];
        if (MASK_BIAS) bias += BLOCK * a.mask_bias.stride[4];
    }

    __device__ void copy(const EvoformerArguments &a, Stage &stage) {
        const int64 k_step = AT_ONCE * a.k.stride[2], v_step = AT_ONCE * a.v.stride[2];
        const Element *k_row = k, *v_row = v;
        unsigned kept = 0;  // of two rows s
#pragma unroll
        for (int r = 0; r < ACROSS; ++r) {
            if (r % 2 == 0) {
                const bool keep = raw[r / 2].mask != 0;
                kept = __ballot_sync(ALL_LANES, keep);
                if (r + lane() / 16 < ACROSS) {
                    RowKeys &keys = stage.keys[r + lane() / 16];
                    const int place = place_of(own);
                    keys.choice[place] = keep ? choice_of(own) : DROPPED;
                    if (MASK_BIAS)
                        keys.bias[place] = keep ? to_float(raw[r / 2].bias) : -infinity();
                    if (lane() % 16 == 0)
                        reinterpret_cast<unsigned char *>(&keys.kept)[first / 16] =
                            (kept >> lane() & 0xffffu) != 0;
                }
            }
            const unsigned ours = part.there ? kept >> 16 * (r % 2) >> part.row : 0;
            const Element *k_piece = k_row, *v_piece = v_row;
            if (part.row < AT_ONCE) {
#pragma unroll
                for (int i = 0; i < 16; i += AT_ONCE) {
                    const bool wanted = (ours >> i & 1) != 0;
                    const int to = first + part.row + i;
                    cp_async_16(&stage.k[r].piece[part.piece][to], k_piece, wanted);
                    cp_async_16(&stage.v[r].piece[part.piece][to], v_piece, wanted);
                    k_piece += k_step, v_piece += v_step;
                }
            }
            k_row += a.k.stride[1], v_row += a.v.stride[1];
        }
        k += BLOCK * a.k.stride[2], v += BLOCK * a.v.stride[2];
    }
};

// Copies all that the block multiplies, in the order in which it does.
__device__ void copy(const EvoformerArguments &a, Shared &shared) {
    const unsigned last = Work::count(a, a.Q, a.H);
    const int heads = static_cast<int>(a.H) / static_cast<int>(a.G);  // of a group
    PairBiases biases;
    KeyRowsOf keys(a);
    Turn turn;
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        const Work place(a, a.Q, a.H, work);
        const int queries = clamp(a.Q - place.first, 0, QUERIES);
        wait_for(&shared.q_done, 1 - n % 2);
        copy_queries(a, shared, place, queries, shared.target[n % 2]);
        arrive_with_copies(&shared.q_there);
        arrive(&shared.q_there);

        biases.start(a, place, queries);
        keys.start(a, place, static_cast<int>(place.at.h) / heads);
        for (int left = static_cast<int>(a.K); left > 0; left -= BLOCK, ++turn.count) {
            Stage &stage = shared.stage[turn.stage()];
            wait_for(&shared.done[turn.stage()], 1 - turn.phase());
            biases.copy(a, stage.pair_bias, left);
            keys.copy(a, stage);
            keys.read(a);
            arrive_with_copies(&shared.there[turn.stage()]);
            arrive(&shared.there[turn.stage()]);
        }
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

// A lane's place in the pair bias of a warp's queries, and among the keys of sixteen, both in bytes: that
// many further than what is known of the place is one instruction's address.
struct Corner {
    int bias, key;

    template <class T>
    __device__ static const T *beyond(const T *place, int bytes) {
        return reinterpret_cast<const T *>(reinterpret_cast<const unsigned char *>(place) + bytes);
    }
};

// Products q · k become weights, of the tile's keys from `first` on; where they are float16, over the unit.
// `number` is that of the first of the warp's sixteen queries.
template <bool CAREFUL>
__device__ inline void weigh(Logits &s, const EvoformerArguments &a, const Piece &piece, int64 number,
                             const BiasRow *pair_bias, const RowKeys &keys, int first,
                             const Corner &corner) {
    Query precise[2];
    if (CAREFUL)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            precise[half] = query_of(a, number + lane() / 4 + 8 * half, piece.shift[half]);
#pragma unroll
    for (int n = 0; n < LOGIT_TILES; n += 2) {
        unsigned bias[4];  // rows, rows + 8; then the next eight keys
        ldmatrix_x4(bias, Corner::beyond(*pair_bias + first + 8 * n, corner.bias));
        const uint4 choices = *reinterpret_cast<const uint4 *>(
            Corner::beyond(keys.choice + first + 8 * n, corner.key));
        float4 mask_biases = {};
        if (MASK_BIAS)
            mask_biases = *reinterpret_cast<const float4 *>(
                Corner::beyond(keys.bias + first + 8 * n, corner.key));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint2 choice =
                i == 0 ? make_uint2(choices.x, choices.y) : make_uint2(choices.z, choices.w);
            const float2 mask_bias = i == 0 ? make_float2(mask_biases.x, mask_biases.y)
                                            : make_float2(mask_biases.z, mask_biases.w);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 add = choose(bias[2 * i + half], choice);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float &one = s[n + i][2 * half + e];
                    const float plus = e == 0 ? add.x : add.y;
                    if (MASK_BIAS)  // logits: rule EVO-2
                        one = fmaf(one, a.scale, e == 0 ? mask_bias.x : mask_bias.y) + plus;
                    else
                        one = fmaf(one, a.scale, plus);
                    if (CAREFUL) {
                        const Query &query = precise[half];
                        one = exponential<true>(one, query.top, query.shift) * query.inverse;
                        if (ELEMENT == 1) one /= piece.unit;
                    } else
                        one = exp2_approximate(fmaf(one, LOG2_E, -piece.shift[half]));
                }
            }
        }
    }
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

// Of which bytes any is set where a key of a chunk is kept.
__device__ constexpr unsigned of_chunk(int chunk) {
    return (CHUNK == 64 ? 0xffffffffu : (1u << CHUNK / 2) - 1) << chunk * CHUNK / 2;
}

// What a warp works at: queries of one row s, for each of its team's turns sixteen.
struct Own {
    int r, query;  // of the block: the row s, and the first query of the first turn
    Corner corner;
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

    // Adds a tile of keys to dq. `kept` is the number of the block's first query, of those that the
    // backward keeps.
    //
    // Chunks are numbered: all of a turn's, then the next turn's. Products are under way while others are
    // looked at: those of q and the next chunk's keys all the time; those of the cotangent, and of the
    // chunk before with k, while the chunk's weights are computed.
    template <bool CAREFUL>
    __device__ void add(const EvoformerArguments &a, const Shared &shared, const Stage &stage,
                        unsigned any, int64 kept) {
        constexpr int LAST = TURNS * CHUNKS - 1;
        Logits s[2], dp;
        const auto begin_logits = [&](int chunk) {
            const int turn = chunk / CHUNKS;
            if (!HELD && chunk % CHUNKS == 0) load_left(q[0], shared.q[r], query + 64 * turn);
            warpgroup_begin();
            multiply_rows(s[chunk % 2], q[HELD ? turn : 0], stage.k[r], chunk % CHUNKS * CHUNK);
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
            // Where no key is kept, products are 0, and so are the weights. Without a branch here, the
            // assembler would wait for dp before all weights are computed, instead of after.
            if ((any & of_chunk(chunk % CHUNKS)) != 0)
                weigh<CAREFUL>(mine, a, piece, kept + query + 64 * turn,
                               stage.pair_bias + query + 64 * turn, stage.keys[r], first, corner);
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
    __device__ void add_all(const EvoformerArguments &a, Shared &shared, Turn &turn, int64 kept) {
        for (int left = static_cast<int>(a.K); left > 0; left -= BLOCK, ++turn.count) {
            const Stage &stage = shared.stage[uniform(turn.stage())];
            wait_for(&shared.there[turn.stage()], turn.phase());
            __syncwarp();
            const unsigned any = uniform(stage.keys[r].kept);
            if (any != 0) {
                shared_for_warpgroups();
                add<CAREFUL>(a, shared, stage, any, kept);
            }
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
    own.corner = {lane() % 16 * static_cast<int>(sizeof(BiasRow)) + lane() / 16 * 16,
                  lane() % 4 * 16};
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
        const bool careful = any_careful(shared.told[own.r] + first);
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
    evoformer_warpgroup_backward_query(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    if (threadIdx.x == 0) {
        // by each thread that copies twice: with its copies, and with what it has written itself
        expect(&shared.q_there, 2 * COPYING), expect(&shared.q_done, MULTIPLYING / 32);
        for (int i = 0; i < STAGES; ++i)
            expect(&shared.there[i], 2 * COPYING), expect(&shared.done[i], MULTIPLYING / 32);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        copy(a, shared);
    } else {
        take_more_registers<MORE>();
        multiply(a, shared);
    }
}
