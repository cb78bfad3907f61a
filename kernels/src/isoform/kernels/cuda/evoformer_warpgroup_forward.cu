// Evoformer attention on the tensor cores of Hopper: out and lse.
//
// What `evoformer_tensor_forward.cu` computes, by the same algorithm and with the same logits, where a
// logit is to cost few instructions. There, a warp fetches each tile of keys from shared memory for 32
// queries, by instructions of its own; here, four warps multiply 64 queries by a tile that lies where
// it is (`wgmma`), and what is left of a logit is its softmax: to widen its pair bias, scale and add, compare,
// shift, exponentiate, sum. That its key is dropped its product says, to which −inf was added.
//
// A block does GROUPS times 64 queries, of one head, of ROWS rows s, and then others: there are as many blocks
// as can be at once. A warp does TURNS of the rows, one after the other, with the same tile of the pair bias,
// which is fetched once for all of them.
//
// Defines, besides those of evoformer_warpgroup.cuh: GROUPS, ROWS, TURNS. BLOCK is 64.

#define TEAMS (GROUPS * ROWS / TURNS)
#include "evoformer_warpgroup.cuh"

constexpr int QUERIES = 64 * GROUPS;
constexpr int KEY_TILES = BLOCK / 8;
constexpr int AT_ONCE = ROWS / TURNS;  // rows s that are done at once

static_assert(BLOCK == 64 && ROWS % TURNS == 0, "as many as a product has; teams do as many turns");

using KeyRows = Boxes<BLOCK>;
using QueryRows = Boxes<QUERIES>;

struct alignas(1024) Stage {
    SwizzledRow pair_bias[QUERIES];
    KeyRows k[ROWS], v[ROWS];
    Additions mask[ROWS];
};

// Where the results of one row s go: of the block's first query.
struct Target {
    Element *out;
    float *lse;    // null where it is not wanted
    int64 number;  // of those the backward wants, −1 where it is not wanted
    int queries;   // that there are, 0 if the row is not there
};

constexpr int MOST_WORKS = 1024;  // of a block

constexpr int WORKS = 2;  // whose queries are there at once: those of the next are fetched ahead
using WorkTurn = InTurn<WORKS>;

struct Shared {
    Stage stage[STAGES];
    QueryRows q[WORKS][ROWS];
    Target target[WORKS][ROWS];
    Halves halves;
    KeptKeys kept[STAGES][ROWS];
    Signal q_there[WORKS], q_done[WORKS], fetched[STAGES], there[STAGES], done[STAGES], finished;
    unsigned char again[MOST_WORKS];  // which of the block's works are to be done again, carefully
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// What the kernel is given: the operands, and how the tiles that it fetches lie.
struct Given {
    EvoformerArguments a;
    TileMap q, k, v, pair_bias;
};

// A weight is 2^(s log₂ e − shift), where shift is top log₂ e, rounded.
__device__ inline float shift_of(float top) { return __fmul_rn(top, LOG2_E); }

// By what part weights are more than e^(s − top).
__device__ inline float excess_of(float top) {
    return fmaf(top, LOG2_E, -shift_of(top)) * (1.0f / LOG2_E);
}

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
            by = exp2_approximate(shift_of(top[half]) - shift_of(most));
        top[half] = most;
        total[half] *= by;
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n) o[n][2 * half] *= by, o[n][2 * half + 1] *= by;
    }

    // Whether the quick way may have gone wrong in one of the warp's first `queries`: no logit within
    // bounds, or something not finite.
    __device__ bool doubtful(int queries) const {
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
__device__ inline void attend(Running &running, const QueryRows &q, int query, const Stage &stage, int r,
                              const KeptKeys &kept, const Halves &halves, float scale) {
    float s[KEY_TILES][4];
    warpgroup_begin();
    multiply_rows(s, q, query, stage.k[r], 0);
    if (!MASK_BIAS) add_to_columns(s, halves, stage.mask[r], 0);
    warpgroup_commit();
    warpgroup_wait();

    // Logits (rule EVO-2), −inf where the key is dropped.
    const SwizzledRow &row = stage.pair_bias[query + lane() % 16];
#pragma unroll
    for (int n = 0; n < KEY_TILES; n += 2) {
        unsigned bias[4];  // rows, rows + 8; then the next eight keys
        ldmatrix_x4(bias, row.piece(n + lane() / 16, lane()));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = 8 * (n + i) + 2 * (lane() % 4);
            float2 mask_bias = {};
            if (MASK_BIAS) mask_bias = unpack(*reinterpret_cast<const unsigned *>(stage.mask[r].of(key)));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float *logit = &s[n + i][2 * half];
                const float2 add = unpack(bias[2 * i + half]);
                if (MASK_BIAS) {
                    logit[0] = fmaf(logit[0], scale, mask_bias.x) + add.x;
                    logit[1] = fmaf(logit[1], scale, mask_bias.y) + add.y;
                } else {
                    logit[0] = fmaf(logit[0], scale, add.x);
                    logit[1] = fmaf(logit[1], scale, add.y);
                }
                if (CAREFUL) {  // beside a query that is not finite, −inf became NaN
                    if (!kept(key)) logit[0] = -infinity();
                    if (!kept(key + 1)) logit[1] = -infinity();
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
        const float top = running.top[half], shift = shift_of(top);
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
    multiply_columns(running.o, weights, stage.v[r], 0);
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

// Fetches all that the block multiplies, in the order in which it does: one thread.
template <bool CAREFUL>
__device__ void fetch(const Given &given, Shared &shared, Turn &turn, WorkTurn &q_turn) {
    const EvoformerArguments &a = given.a;
    const unsigned last = Work::count(a, a.Q, a.H);
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        if (CAREFUL && !shared.again[n]) continue;
        const int buffer = q_turn.stage();
        wait_for(&shared.q_done[buffer], 1 - q_turn.phase());
        const Work place(a, a.Q, a.H, work);
        const int query = static_cast<int>(place.first), queries = clamp(a.Q - place.first, 0, QUERIES);
        const int b = static_cast<int>(place.at.b), s = static_cast<int>(place.at.s);
        const int h = static_cast<int>(place.at.h);
#pragma unroll 1
        for (int r = 0; r < ROWS; ++r)
            shared.target[buffer][r] =
                target_of(a, place.row(r), place.first, s + r < a.S ? queries : 0);
        arrive_expecting(&shared.q_there[buffer], sizeof(shared.q[buffer]));
#pragma unroll 1
        for (int r = 0; r < ROWS; ++r)
            fetch_rows(shared.q[buffer][r], given.q, query, h, s + r, b, &shared.q_there[buffer]);
        ++q_turn.count;

        fetch_keys<ROWS>(given, shared, turn, place);
    }
}

// Tells of all keys, and makes zeros of those that are dropped, which must not be seen (rule EVO-4).
template <bool CAREFUL>
__device__ void tell(const EvoformerArguments &a, Shared &shared, Turn &turn) {
    const unsigned last = Work::count(a, a.Q, a.H);
    for (unsigned work = blockIdx.x, n = 0; work < last; work += gridDim.x, ++n) {
        if (CAREFUL && !shared.again[n]) continue;
        KeysOfRows<ROWS> keys;
        keys.start(a, Work(a, a.Q, a.H, work));
        keys.tell(a, shared, turn);
    }
}

// --- The warps that multiply ---------------------------------------------------------------------

// Writes the warp's queries of one row s, from `query` of the block on.
template <bool CAREFUL>
__device__ inline void finish(const EvoformerArguments &a, const Running &running,
                              const Target &target, int query, bool seen) {
    const float totals[2] = {over_row(running.total[0]), over_row(running.total[1])};
    const int first = query + lane() / 4, upper = lane() % 4, own = first + 8 * upper;
    if (upper < 2 && own < target.queries) {  // two lanes of each four, of a query each
        const float total = upper == 0 ? totals[0] : totals[1];
        const float largest = upper == 0 ? running.top[0] : running.top[1];
        const float top = seen ? largest : -infinity();
        const float sum = CAREFUL ? total : fmaf(total, -excess_of(largest), total);
        if (target.lse != nullptr)
            target.lse[own * a.lse.stride[3]] = total != 0.0f ? top + logf(sum) : -infinity();
        if (target.number >= 0) keep_softmax(a, target.number + own, top, sum);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = first + 8 * half;
        if (i >= target.queries) continue;
        const bool alive = totals[half] != 0.0f;  // not top: a row of nothing but NaN has no largest logit
        const float inverse = reciprocal_approximate(totals[half]);
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
#pragma unroll
            for (int i = 0; i < TURNS; ++i) {
                const int r = first_row + i * AT_ONCE;
                const KeptKeys &kept = shared.kept[turn.stage()][r];
                if (!kept.any()) continue;
                seen[i] = true;
                attend<CAREFUL>(running[i], shared.q[buffer][r], query, stage, r, kept, shared.halves,
                                a.scale);
            }
            __syncwarp();
            if (lane() == 0) arrive(&shared.done[turn.stage()]);
        }
        bool misfit = false;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const Target &target = shared.target[buffer][first_row + i * AT_ONCE];
            misfit |= seen[i] && running[i].doubtful(target.queries - query);
            finish<CAREFUL>(a, running[i], target, query, seen[i]);
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
    for (int n = 0; n < MOST_WORKS; n += 4) found |= *reinterpret_cast<unsigned *>(shared.again + n) != 0;
    return found;
}

extern "C" __global__ void __launch_bounds__(MULTIPLYING + COPYING, BLOCKS)
    evoformer_warpgroup_forward(const __grid_constant__ Given given) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const EvoformerArguments &a = given.a;

    for (int n = threadIdx.x; n < MOST_WORKS; n += blockDim.x) shared.again[n] = 0;
    shared.halves.make();
    for (int i = 0; i < STAGES; ++i)
        for (int r = 0; r < ROWS; ++r) shared.stage[i].mask[r].make();
    if (threadIdx.x == 0) {
        for (int i = 0; i < WORKS; ++i)
            expect(&shared.q_there[i], 1), expect(&shared.q_done[i], MULTIPLYING / 32);
        expect_stages(shared, Telling<ROWS>::TELLERS, MULTIPLYING / 32);
        expect(&shared.finished, MULTIPLYING);
    }
    shared_for_warpgroups();
    __syncthreads();

    Turn turn;
    WorkTurn q_turn;
    if (static_cast<int>(threadIdx.x) >= MULTIPLYING) {
        take_fewer_registers<FEWER>();
        if (copier() == 0) {
            fetch<false>(given, shared, turn, q_turn);
            if (any_again(shared)) fetch<true>(given, shared, turn, q_turn);
        } else if (Telling<ROWS>::is_one()) {
            tell<false>(a, shared, turn);
            if (any_again(shared)) tell<true>(a, shared, turn);
        }
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
