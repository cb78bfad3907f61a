// Evoformer attention on the tensor cores of Hopper: out and lse.
//
// What `evoformer_tensor_forward.cu` computes, by the same algorithm and with the same logits, where a
// logit is to cost few instructions. There, a warp fetches each tile of keys from shared memory for 32
// queries, by instructions of its own; here, four warps multiply 64 queries by a tile that lies where
// it is (`wgmma`), and what is left of a logit is its softmax: to widen its pair bias and drop its key
// (one byte permutation does both), scale and add, compare, shift, exponentiate, sum.
//
// A block does GROUPS times 64 queries, of one head, of ROWS rows s, and then others: there are as many blocks
// as can be at once. A warp does TURNS of the rows, one after the other, with the same tile of the pair bias,
// which is read once for all of them. One warpgroup more copies the next tiles meanwhile, and gives its
// registers to the others: who multiplies issues no copies, and waits for nobody else, warp by warp.
//
// Defines, besides those of evoformer_tensor.cuh: GROUPS, ROWS, TURNS, and FEWER, the registers of a thread
// that copies. Rows of all operands, and of the pair bias, which must be there, are copied 16 bytes at a time.
// M_TILES is 1, BLOCK is 64.

#define TEAMS (GROUPS * ROWS / TURNS)
#include "evoformer_warpgroup.cuh"

constexpr int QUERIES = 64 * GROUPS;
constexpr int KEY_TILES = BLOCK / 8;
constexpr int AT_ONCE = ROWS / TURNS;  // rows s that are done at once

static_assert(BLOCK == 64 && ROWS % TURNS == 0, "as many as a product has; teams do as many turns");

using KeyRows = Columns<BLOCK>;
using QueryRows = Columns<QUERIES>;

struct Stage {
    KeyRows k[ROWS], v[ROWS];
    BiasRow pair_bias[QUERIES];
    KeyTile keys[ROWS];
};

// Where the results of one row s go: of the block's first query.
struct Target {
    Element *out;
    float *lse;     // null where it is not wanted
    int64 number;   // of those the backward wants, −1 where it is not wanted
    int64 queries;  // that there are, 0 if the row is not there
};

constexpr int MOST_WORKS = 1024;  // of a block

constexpr int WORKS = 2;  // whose queries are there at once: those of the next are copied ahead
using WorkTurn = InTurn<WORKS>;

struct Shared {
    QueryRows q[WORKS][ROWS];
    Target target[WORKS][ROWS];
    Stage stage[STAGES];
    Signal q_there[WORKS], q_done[WORKS], there[STAGES], done[STAGES], finished;
    unsigned char again[MOST_WORKS];  // which of the block's works are to be done again, carefully
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// The softmax so far of a lane's two queries of one row s, lane / 4 and lane / 4 + 8 of the warp's:
// Σ e^(s − top) v and Σ e^(s − top), the latter of the lane's keys.
//
// At first top is −HUGE_LOGIT, which spares us the question whether there is a logit yet. Who has none
// above that is done again, carefully, with a top that starts at −inf.
struct Running {
    float o[CHANNEL_TILES][4];
    float total[2], top[2];

    __device__ void start(bool careful) {
        total[0] = total[1] = 0.0f;
        top[0] = top[1] = careful ? -infinity() : -HUGE_LOGIT;
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[n][e] = 0.0f;
    }

    // Raises top to the largest logit so far, of those the lanes of a row have.
    template <bool CAREFUL>
    __device__ void raise(int half, float most) {
        most = fmaxf(most, top[half]);
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        float by;
        if (CAREFUL)
            by = top[half] == -infinity() ? 0.0f : exp2_approximate((top[half] - most) * LOG2_E);
        else
            by = exp2_approximate(top[half] * LOG2_E - most * LOG2_E);
        top[half] = most;
        total[half] *= by;
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n) o[n][2 * half] *= by, o[n][2 * half + 1] *= by;
    }

    // Whether the quick way may have gone wrong in one of the warp's first `queries`: no logit within
    // bounds, or something not finite.
    __device__ bool doubtful(int64 queries) const {
        bool found = false;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            found |= lane() / 4 + 8 * half < queries &&
                     (!(fabsf(top[half]) < HUGE_LOGIT) || total[half] != total[half]);
        return found;
    }
};

// Adds a tile of keys to the softmax of the warp's queries, `query` the first in the block.
template <bool CAREFUL>
__device__ inline void attend(Running &running, const QueryRows &q, int query, const KeyRows &k,
                              const KeyRows &v, const BiasRow *pair_bias, const KeyTile &keys,
                              float scale) {
    float s[KEY_TILES][4];
    warpgroup_begin();
    multiply_rows(s, q, query, k, 0);
    warpgroup_commit();
    warpgroup_wait();

    // Logits (rule EVO-2), −inf where the key is dropped.
#pragma unroll
    for (int n = 0; n < KEY_TILES; n += 2) {
        unsigned bias[4];  // rows, rows + 8; then the next eight keys
        ldmatrix_x4(bias, pair_bias[query + lane() % 16] + 8 * n + 8 * (lane() / 16));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = 8 * (n + i) + 2 * (lane() % 4);
            const uint2 choice = *reinterpret_cast<const uint2 *>(keys.choice + key);
            float2 mask_bias = {};
            if (MASK_BIAS) mask_bias = *reinterpret_cast<const float2 *>(keys.bias + key);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float *logit = &s[n + i][2 * half];
                const float2 add = choose(bias[2 * i + half], choice);
                if (MASK_BIAS) {
                    logit[0] = fmaf(logit[0], scale, mask_bias.x) + add.x;
                    logit[1] = fmaf(logit[1], scale, mask_bias.y) + add.y;
                } else {
                    logit[0] = fmaf(logit[0], scale, add.x);
                    logit[1] = fmaf(logit[1], scale, add.y);
                }
                if (CAREFUL) {  // beside a query that is not finite, −inf became NaN
                    if (choice.x == DROPPED) logit[0] = -infinity();
                    if (choice.y == DROPPED) logit[1] = -infinity();
                }
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < KEY_TILES; ++n)
            most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        running.raise<CAREFUL>(half, most);
    }
    unsigned weights[BLOCK / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float top = running.top[half], shift = top * LOG2_E;
        float sum = 0.0f;  // by itself: shorter sums round less
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n) {
            const float low = exponential<CAREFUL>(s[n][2 * half], top, shift);
            const float high = exponential<CAREFUL>(s[n][2 * half + 1], top, shift);
            sum += low;
            sum += high;
            weights[n / 2][n % 2 * 2 + half] = pack(low, high);
        }
        running.total[half] += sum;
    }
    warpgroup_begin();
    multiply_columns(running.o, weights, v, 0);
    warpgroup_commit();
    warpgroup_wait();
}

using Work = Place<QUERIES, ROWS>;

// --- The warps that copy -------------------------------------------------------------------------

__device__ inline Target target_of(const EvoformerArguments &a, const Head &at, int64 first,
                                   int queries) {
    float *lse = nullptr;
    if (a.lse.data != nullptr)
        lse = static_cast<float *>(a.lse.data) + at.b * a.lse.stride[0] + at.s * a.lse.stride[1] +
              at.h * a.lse.stride[2] + first * a.lse.stride[3];
    const int64 number = a.top == nullptr ? -1 : number_of(a, at, first);
    return {channels_of(a.out, at, first), lse, number, queries};
}

// A lane's keys of a row s, of each tile one of every 32: read a tile before they are needed, and left as
// they came, so that nobody waits for them.
struct LaneKeys {
    const unsigned char *mask;  // anything where there is none
    const Element *bias;
    int left;  // keys, from the lane's first on
    KeyStream::Raw raw[BLOCK / 32];

    __device__ void start(const EvoformerArguments &a, const Head &at, bool present) {
        mask = static_cast<const unsigned char *>(a.mask.data) + at.b * a.mask.stride[0] +
               at.s * a.mask.stride[1] + lane() * a.mask.stride[2];
        if (MASK_BIAS)
            bias = static_cast<const Element *>(a.mask_bias.data) + at.b * a.mask_bias.stride[0] +
                   at.s * a.mask_bias.stride[1] + lane() * a.mask_bias.stride[4];
        left = present ? static_cast<int>(a.K) - lane() : 0;
    }

    // The next tile's.
    __device__ void read(const EvoformerArguments &a) {
#pragma unroll
        for (int part = 0; part < BLOCK / 32; ++part) {
            const bool there = left > 32 * part;
            raw[part].mask = there;
            round_to(0.0f, &raw[part].bias);
            if (there && a.mask.data != nullptr) raw[part].mask = mask[32 * part * a.mask.stride[2]];
            if (MASK_BIAS && there) raw[part].bias = bias[32 * part * a.mask_bias.stride[4]];
        }
        left -= BLOCK;
        mask += BLOCK * a.mask.stride[2];
        if (MASK_BIAS) bias += BLOCK * a.mask_bias.stride[4];
    }
};

// Copies all that the block multiplies, in the order in which it does. Each of the four warps copies a
// quarter of q and of the pair bias, and k or v of every second row s.
template <bool CAREFUL>
__device__ void copy(const EvoformerArguments &a, Shared &shared, Turn &turn, WorkTurn &q_turn) {
    constexpr int PER_ROW = BLOCK / 8, PIECE_ROWS = COPYING / PER_ROW, ROWS_EACH = (ROWS + 1) / 2;
    const bool values = copier() / 32 % 2 == 1;
    const int64 stride = values ? a.v.stride[2] : a.k.stride[2];
    const int row = copier() / PER_ROW, column = copier() % PER_ROW * 8;  // of the pair bias
    const RowCopier<COPYING> of_queries(a, copier());
    const RowCopier<32> of_keys(a, lane());
    const unsigned last = Work::count(a, a.Q, a.H);
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        if (CAREFUL && !shared.again[n]) continue;
        const int buffer = q_turn.stage();
        wait_for(&shared.q_done[buffer], 1 - q_turn.phase());
        const Work place(a, a.Q, a.H, work);
        const int queries = clamp(a.Q - place.first, 0, QUERIES);
#pragma unroll 1
        for (int r = 0; r < ROWS; ++r) {
            const Head at = place.row(r);
            const int rows = at.s < a.S ? queries : 0, ours = rows - of_queries.row;
            of_queries.copy(shared.q[buffer][r],
                            of_queries.first(channels_of(a.q, at, place.first), a.q.stride[2]),
                            a.q.stride[2], [=](int i) { return i < ours; });
            if (copier() == 0) shared.target[buffer][r] = target_of(a, at, place.first, rows);
        }
        arrive_with_copies(&shared.q_there[buffer]);
        arrive(&shared.q_there[buffer]);
        ++q_turn.count;

        const Head group = a.H == a.G ? place.at : group_of(a, place.at);
        LaneKeys keys[ROWS_EACH];
        const Element *from[ROWS_EACH];
        const int first_row = copier() / 64;  // the warp's first row s, of every second
#pragma unroll
        for (int i = 0; i < ROWS_EACH; ++i) {
            const int r = first_row + 2 * i;
            const bool present = r < ROWS && place.at.s + r < a.S;
            keys[i].start(a, place.row(r), present);
            keys[i].read(a);
            from[i] = of_keys.first(
                channels_of(values ? a.v : a.k, {group.b, group.s + r, group.h}, 0), stride);
        }
        const Element *pair_bias = static_cast<const Element *>(a.pair_bias.data) +
                                   place.at.b * a.pair_bias.stride[0] +
                                   place.at.h * a.pair_bias.stride[2] +
                                   (place.first + row) * a.pair_bias.stride[3] + column;
        for (int left = static_cast<int>(a.K); left > 0; left -= BLOCK, ++turn.count) {
            Stage &stage = shared.stage[turn.stage()];
            wait_for(&shared.done[turn.stage()], 1 - turn.phase());
            BiasRow *to = stage.pair_bias + row;
            const Element *piece = pair_bias;
            if (queries == QUERIES && left >= BLOCK) {
#pragma unroll
                for (int i = 0; i < QUERIES; i += PIECE_ROWS) {
                    cp_async_16(to[i] + column, piece);
                    // from the one before, not by a multiple of its own
                    piece += PIECE_ROWS * a.pair_bias.stride[3] + unknown_zero();
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < QUERIES; i += PIECE_ROWS) {
                    cp_async_16(to[i] + column, piece, i + row < queries && column < left);
                    piece += PIECE_ROWS * a.pair_bias.stride[3];
                }
            }
            pair_bias += BLOCK;
#pragma unroll
            for (int i = 0; i < ROWS_EACH; ++i) {
                const int r = first_row + 2 * i;
                if (r >= ROWS) break;
                KeyTile &told = stage.keys[r];
                unsigned kept[BLOCK / 32];
                bool any = false, all = a.D == HEAD_DIM;
#pragma unroll
                for (int part = 0; part < BLOCK / 32; ++part) {
                    const bool keep = keys[i].raw[part].mask != 0;
                    kept[part] = __ballot_sync(ALL_LANES, keep);
                    any |= kept[part] != 0, all &= kept[part] == ALL_LANES;
                    if (values) continue;
                    const int j = lane() + 32 * part;
                    told.choice[j] = keep ? choice_of(j) : DROPPED;
                    if (MASK_BIAS) told.bias[j] = keep ? to_float(keys[i].raw[part].bias) : -infinity();
                }
                if (!values && lane() == 0) told.any = any;
                of_keys.copy(values ? stage.v[r] : stage.k[r], from[i], stride, kept, all);
                from[i] += BLOCK * stride;
                keys[i].read(a);
            }
            arrive_with_copies(&shared.there[turn.stage()]);
            arrive(&shared.there[turn.stage()]);
        }
    }
}

// --- The warps that multiply ---------------------------------------------------------------------

// Writes the warp's queries of one row s, from `query` of the block on.
__device__ inline void finish(const EvoformerArguments &a, const Running &running,
                              const Target &target, int query, bool seen) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = over_row(running.total[half]);
        const bool alive = total != 0.0f;  // not top: a row of nothing but NaN has no largest logit
        const int i = query + lane() / 4 + 8 * half;
        if (i >= target.queries) continue;
        if (lane() % 4 == 0) {
            const float top = seen ? running.top[half] : -infinity();
            if (target.lse != nullptr)
                target.lse[i * a.lse.stride[3]] = alive ? top + logf(total) : -infinity();
            if (target.number >= 0) keep_softmax(a, target.number + i, top, total);
        }
        const float inverse = reciprocal_approximate(total);
        Element *out = target.out + i * a.out.stride[2] + 2 * (lane() % 4);
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
            if (8 * n < static_cast<int>(a.D))
                *reinterpret_cast<unsigned *>(out + 8 * n) =
                    alive ? pack(running.o[n][2 * half] * inverse,
                                 running.o[n][2 * half + 1] * inverse)
                          : 0u;
    }
}

template <bool CAREFUL>
__device__ void multiply(const EvoformerArguments &a, Shared &shared, Turn &turn, WorkTurn &q_turn) {
    const int team = uniform(static_cast<int>(threadIdx.x) / 128), first_row = team % AT_ONCE;
    const int query =  // the warp's first in the block
        team / AT_ONCE * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    const unsigned last = Work::count(a, a.Q, a.H);
    const int tiles = tiles_of(a.K, BLOCK);
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        if (CAREFUL && !shared.again[n]) continue;
        Running running[TURNS];
        bool seen[TURNS];  // whether any key is kept
#pragma unroll
        for (int i = 0; i < TURNS; ++i) running[i].start(CAREFUL), seen[i] = false;

        const int buffer = q_turn.stage();
        wait_for(&shared.q_there[buffer], q_turn.phase());
        for (int t = 0; t < tiles; ++t, ++turn.count) {
            const Stage &stage = shared.stage[turn.stage()];
            wait_for(&shared.there[turn.stage()], turn.phase());
            __syncwarp();
            bool any[TURNS];
#pragma unroll
            for (int i = 0; i < TURNS; ++i) any[i] = stage.keys[first_row + i * AT_ONCE].any != 0;
            shared_for_warpgroups();
#pragma unroll
            for (int i = 0; i < TURNS; ++i) {
                if (!any[i]) continue;
                seen[i] = true;
                const int r = first_row + i * AT_ONCE;
                attend<CAREFUL>(running[i], shared.q[buffer][r], query, stage.k[r], stage.v[r],
                                stage.pair_bias, stage.keys[r], a.scale);
            }
            __syncwarp();
            if (lane() == 0) arrive(&shared.done[turn.stage()]);
        }
        bool misfit = false;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const Target &target = shared.target[buffer][first_row + i * AT_ONCE];
            misfit |= seen[i] && running[i].doubtful(target.queries - query);
            finish(a, running[i], target, query, seen[i]);
        }
        __syncwarp();
        if (lane() == 0) arrive(&shared.q_done[buffer]);
        ++q_turn.count;
        if (!CAREFUL && misfit) shared.again[n] = 1;
    }
}

// Whether anything is to be done again: after all have done all.
__device__ inline bool any_again(Shared &shared) {
    wait_for(&shared.finished, 0);
    bool found = false;
    for (int n = lane(); n < MOST_WORKS; n += 32) found |= shared.again[n] != 0;
    return __any_sync(ALL_LANES, found);
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_forward(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);

    for (int n = threadIdx.x; n < MOST_WORKS; n += blockDim.x) shared.again[n] = 0;
    if (threadIdx.x == 0) {
        // By each thread that copies twice: with its copies, and with what it has written itself.
        for (int i = 0; i < WORKS; ++i)
            expect(&shared.q_there[i], 2 * COPYING), expect(&shared.q_done[i], MULTIPLYING / 32);
        for (int i = 0; i < STAGES; ++i)
            expect(&shared.there[i], 2 * COPYING), expect(&shared.done[i], MULTIPLYING / 32);
        expect(&shared.finished, MULTIPLYING);
    }
    __syncthreads();

    Turn turn;
    WorkTurn q_turn;
    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        copy<false>(a, shared, turn, q_turn);
        if (any_again(shared)) copy<true>(a, shared, turn, q_turn);
    } else {
        take_more_registers<MORE>();
        multiply<false>(a, shared, turn, q_turn);
        arrive(&shared.finished);
        if (any_again(shared)) {
            rarely();
            multiply<true>(a, shared, turn, q_turn);
        }
    }
}
