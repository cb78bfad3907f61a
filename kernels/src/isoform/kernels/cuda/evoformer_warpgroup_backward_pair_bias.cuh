// What the kernels for Hopper have in common that sum over rows s for the gradient of the pair bias: a block owns
// a tile of queries × keys of one head, each of its teams 64 × 64 of it, whose sums of p (dp − δ) stay in
// registers; the rows s stream by, all of them or a part. Of S = Q Kᵀ and dP = Ō Vᵀ a team has CHUNK keys at a
// time.
//
// What the mask says of a key is added to its products. Where there is a mask bias, or no room for that, products
// begin with what both say, over scale; in rows where they say nothing, with 0, which costs nothing.
//
// Where tiles alone do not fill the GPU, a.parts blocks share the rows of one. Their sums are added up in
// memory, one after the other, warp by warp, so that equal calls give equal bits. A block's number is drawn
// when it starts: those before it have started too, and none waits for one that cannot run.
//
// Defines: as in evoformer_warpgroup.cuh, and GROUPS, ACROSS: queries and keys of a block, in 64; CHUNK.

#pragma once

#define TEAMS (GROUPS * ACROSS)
#include "evoformer_warpgroup.cuh"
#include "evoformer_warpgroup_backward.cuh"

constexpr int QUERIES = 64 * GROUPS, KEYS = 64 * ACROSS;
constexpr int KEY_TILES = 64 / 8;  // of a team
constexpr int WARPS_MULTIPLYING = 4 * TEAMS;

constexpr bool ADDED = !MASK_BIAS && KEYS <= 128;  // what the mask says

using QueryRows = Boxes<QUERIES>;
using KeyRows = Boxes<KEYS>;

// What a row s says of 64 keys.
enum Kept : unsigned { NONE_KEPT, SOME_KEPT, ALL_ALIKE };  // the last: all, and there is no mask bias

// What a warp has to do for its queries: those of its team have no keys, or its own; one of them takes care.
enum Way : unsigned { TEAM_HAS_NONE, WARP_HAS_NONE, QUICKLY, CAREFULLY };

struct alignas(256) Stage {
    QueryRows q, cotangent;
    KeyRows k, v;
    union {
        Additions mask[ADDED ? ACROSS : 1];  // to products
        float start[KEYS];  // or as they begin; not written where all keys are alike
    };
    float2 shift[QUERIES / 2], minus_delta[QUERIES / 2];  // of queries r and r + 8 of each sixteen
    float bias[MASK_BIAS ? KEYS : 4];  // the mask bias
    unsigned kept[KEYS / 32];          // a bit for each key
    Kept keys[ACROSS];                 // of each 64
    Way way[QUERIES / 16];             // of each warp
};

template <class T>
constexpr int pieces_of = sizeof(T) / 16;

// What the block does.
struct Part {
    Head at;  // of its first row s
    int64 first_query, first_key;
    int rows, tile, part;
};

// The shared memory of a block.
struct Common {
    Stage stage[STAGES];
    uint4 pair_bias[KEY_TILES / 2][MULTIPLYING];  // as it came: of eight logits of a lane
    Part place;
    Halves halves;
    int zero;     // whose readers do not know that it is: see again()
    int strange;  // a bit for each warp that multiplies: whether it always takes care
    Signal fetched[STAGES], there[STAGES], done[STAGES];
};

// What the kernels are given: the operands, and how the tiles that they fetch lie.
struct Given {
    EvoformerArguments a;
    TileMap q, cotangent, k, v;
};

__device__ inline Part place_of(const EvoformerArguments &a) {
    const unsigned number =
        a.parts > 1 ? atomicAdd(a.turns + a.pair_bias_tiles, 1) : static_cast<int>(blockIdx.x);
    Part place;
    Blocks block = {number};
    place.first_key = block.next(tiles_of(a.K, KEYS)) * KEYS;
    place.first_query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES;
    place.at.h = block.next(a.H), place.at.b = block.next(a.B);
    place.part = static_cast<int>(block.rest);
    place.tile = static_cast<int>(number - block.rest * (gridDim.x / static_cast<unsigned>(a.parts)));
    place.at.s = a.S * place.part / a.parts;
    place.rows = static_cast<int>(a.S * (place.part + 1) / a.parts - place.at.s);
    return place;
}

// Products begin with biases over scale. A scale of 0 makes queries 0 instead.
__device__ inline bool no_scale(const EvoformerArguments &a) { return fabsf(a.scale) < 1e-30f; }
__device__ inline float scale_of(const EvoformerArguments &a) { return no_scale(a) ? 1.0f : a.scale; }

// --- The warps that copy ---------------------------------------------------------------------------
//
// One thread fetches; another warp tells of the queries, and each of two more of half of the keys.

// Fetches all rows, in the order in which they are multiplied.
__device__ inline void fetch(const Given &given, Common &shared) {
    const Part &place = shared.place;
    const int query = static_cast<int>(place.first_query), key = static_cast<int>(place.first_key);
    const int b = static_cast<int>(place.at.b), h = static_cast<int>(place.at.h);
    const int g = static_cast<int>(group_of(given.a, place.at).h), rows = place.rows;
    int s = static_cast<int>(place.at.s);
    Turn turn;
#pragma unroll 1
    for (int n = 0; n < rows; ++n, ++s, ++turn.count) {
        Stage &stage = shared.stage[turn.stage()];
        Signal *fetched = &shared.fetched[turn.stage()];
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        arrive_expecting(fetched, 2 * (sizeof(stage.q) + sizeof(stage.k)));
        fetch_rows(stage.q, given.q, query, h, s, b, fetched);
        fetch_rows(stage.k, given.k, key, g, s, b, fetched);
        fetch_rows(stage.cotangent, given.cotangent, query, h, s, b, fetched);
        fetch_rows(stage.v, given.v, key, g, s, b, fetched);
    }
}

constexpr int TELLING = 3;  // warps

// Tells of the queries of all rows, and makes zeros of those without a key.
__device__ inline void tell_queries(const EvoformerArguments &a, Common &shared) {
    constexpr int WORDS = QUERIES / 32;
    const Part &place = shared.place;
    const int rows = place.rows, left = clamp(a.Q - place.first_query, 0, QUERIES) - lane();
    const int64 step = a.H * a.Q;
    const bool none = no_scale(a);
    const Told *next = told_of(a, number_of(a, place.at, place.first_query)) + lane();
    Told ahead[WORDS];  // of the next row
    const auto read = [&] {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) ahead[i] = 32 * i < left ? next[32 * i] : Told{infinity(), 0.0f};
        next += step;
    };
    if (rows > 0) read();
    Turn turn;
#pragma unroll 1
    for (int n = 0; n < rows; ++n, ++turn.count) {
        Stage &stage = shared.stage[turn.stage()];
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        bool dead[WORDS];
        unsigned live[WORDS], careful[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const int at = 32 * i + lane() / 16 * 16 + lane() % 8 * 2 + lane() / 8 % 2;
            reinterpret_cast<float *>(stage.shift)[at] = ahead[i].shift;
            reinterpret_cast<float *>(stage.minus_delta)[at] = ahead[i].minus_delta;
            dead[i] = ahead[i].dead();
            live[i] = __ballot_sync(ALL_LANES, !dead[i]);
            careful[i] = __ballot_sync(ALL_LANES, ahead[i].careful());
        }
        unsigned team = 0, warp = 0, care = 0;  // of which the lane says it
#pragma unroll
        for (int i = 0; i < QUERIES / 16; ++i)
            if (lane() == i) {
                team = live[i / 4 * 2] | live[i / 4 * 2 + 1];
                warp = live[i / 2] >> i % 2 * 16 & 0xffffu;
                care = careful[i / 2] >> i % 2 * 16 & 0xffffu;
            }
        if (lane() < QUERIES / 16)
            stage.way[lane()] = care != 0   ? CAREFULLY
                                : warp != 0 ? QUICKLY
                                : team != 0 ? WARP_HAS_NONE
                                            : TEAM_HAS_NONE;
        if (n + 1 < rows) read();
        wait_for(&shared.fetched[turn.stage()], turn.phase());
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            if (dead[i] || none) stage.q.clear(32 * i + lane());
            if (dead[i]) stage.cotangent.clear(32 * i + lane());
        }
        is_told(&shared.there[turn.stage()]);
    }
}

// Tells of half of the keys of all rows, and makes zeros of those that are dropped. What is beyond the keys is
// dropped too: its weights could be infinite.
__device__ inline void tell_keys(const EvoformerArguments &a, Common &shared, int half) {
    constexpr int OWN = KEYS / 2, WORDS = OWN / 32;
    static_assert(OWN % 64 == 0, "who says what a team's keys are knows all of them");
    const Part &place = shared.place;
    const int rows = place.rows, first = half * OWN;
    const int keys = clamp(a.K - place.first_key - first, 0, OWN) - lane();
    const bool masked = a.mask.data != nullptr;
    const float scale = scale_of(a), dropped = scale > 0.0f ? -infinity() : infinity();
    const unsigned char *mask = static_cast<const unsigned char *>(a.mask.data) +
                                place.at.b * a.mask.stride[0] + place.at.s * a.mask.stride[1] +
                                (place.first_key + first + lane()) * a.mask.stride[2];
    const Element *bias = static_cast<const Element *>(a.mask_bias.data) +
                          place.at.b * a.mask_bias.stride[0] + place.at.s * a.mask_bias.stride[1] +
                          (place.first_key + first + lane()) * a.mask_bias.stride[4];
    unsigned char keep[WORDS];  // of the next row
    Element add[WORDS];
    const auto read = [&] {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const bool present = 32 * i < keys;
            keep[i] = present;
            if (masked && present) keep[i] = mask[32 * i * a.mask.stride[2]];
            round_to(0.0f, add + i);
            if (MASK_BIAS && present) add[i] = bias[32 * i * a.mask_bias.stride[4]];
        }
        if (masked) mask += a.mask.stride[1];
        if (MASK_BIAS) bias += a.mask_bias.stride[1];
    };
    if (rows > 0) read();
    Turn turn;
#pragma unroll 1
    for (int n = 0; n < rows; ++n, ++turn.count) {
        Stage &stage = shared.stage[turn.stage()];
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        bool there[WORDS];
        unsigned kept[WORDS], unlike[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            there[i] = keep[i] != 0;
            kept[i] = __ballot_sync(ALL_LANES, there[i]);
            unlike[i] =
                __ballot_sync(ALL_LANES, !there[i] || (MASK_BIAS && to_float(add[i]) != 0.0f));
        }
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const int j = first + 32 * i + lane();
            if (ADDED) {
                round_to(there[i] ? 0.0f : dropped, stage.mask[ADDED ? j / 64 : 0].of(j % 64));
            } else {
                const float y = to_float(add[i]);
                if (MASK_BIAS) stage.bias[j] = y;
                if ((unlike[i / 2 * 2] | unlike[i / 2 * 2 + 1]) != 0)
                    stage.start[j] = there[i] ? y / scale : dropped;
            }
            if (lane() == 0) {
                stage.kept[first / 32 + i] = kept[i];
                if (i % 2 == 1)
                    stage.keys[first / 64 + i / 2] = (kept[i - 1] | kept[i]) == 0       ? NONE_KEPT
                                                     : (unlike[i - 1] | unlike[i]) != 0 ? SOME_KEPT
                                                                                        : ALL_ALIKE;
            }
        }
        if (n + 1 < rows) read();
        wait_for(&shared.fetched[turn.stage()], turn.phase());
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            if (!there[i]) {
                const int j = first + 32 * i + lane();
                stage.k.clear(j), stage.v.clear(j);
            }
        is_told(&shared.there[turn.stage()]);
    }
}

__device__ inline void copy(const Given &given, Common &shared) {
    const int warp = copier() / 32;
    if (copier() == 0)
        fetch(given, shared);
    else if (warp == 1)
        tell_queries(given.a, shared);
    else if (warp > 1)
        tell_keys(given.a, shared, warp - 2);
}

// Before anything else, by all threads: what the block does, and the signals of stages, at the end of which
// `done` so many arrive.
__device__ inline void begin_block(const EvoformerArguments &a, Common &shared, int done) {
    if (threadIdx.x == 0) {
        shared.place = place_of(a);
        shared.zero = shared.strange = 0;
        expect_stages(shared, TELLING, done);
    }
    shared.halves.make();
    if (ADDED)
        for (int i = 0; i < STAGES; ++i)
            for (Additions &mask : shared.stage[i].mask) mask.make();
    shared_for_warpgroups();
}

// --- The warps that multiply ---------------------------------------------------------------------

using Products = float[CHUNK / 8][4];
using Sums = float[KEY_TILES][4];

// The pair bias as it came: sixteen keys at a time, of which a lane has eight logits', each thread beside the
// next.
using OwnBias = const uint4 (*)[MULTIPLYING];

// Puts the pair bias of a lane's logits where it finds it again, of queries from `i` on and keys from `j`
// on; 0 where there is none. Whether any is NaN or +inf: beside a dropped key's −inf it would not do.
__device__ inline bool keep_pair_bias(uint4 (*kept)[MULTIPLYING], const EvoformerArguments &a,
                                      const Head &at, int64 i, int64 j) {
    const Operand &x = a.pair_bias;
    i += lane() / 4, j += 2 * (lane() % 4);
    const Element *from = static_cast<const Element *>(x.data) + at.b * x.stride[0] +
                          at.h * x.stride[2] + i * x.stride[3] + j;
    bool strange = false;
#pragma unroll
    for (int n = 0; n < KEY_TILES / 2; ++n, from += 16, j += 16) {
        unsigned pair[4];  // rows, rows + 8; then the next eight keys
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const int down = part % 2 * 8, right = part / 2 * 8;
            pair[part] = i + down < a.Q && j + right < a.K
                             ? *reinterpret_cast<const unsigned *>(from + down * x.stride[3] + right)
                             : 0u;
            const float2 y = unpack(pair[part]);
            strange |= !(y.x < infinity()) || !(y.y < infinity());
        }
        kept[n][threadIdx.x] = {pair[0], pair[1], pair[2], pair[3]};
    }
    return strange;
}

// Two of them, of keys 8 n + 2 (lane % 4) and the next, and the lane's upper or lower query.
__device__ inline float2 kept_pair_bias(OwnBias kept, int thread, int n, int half) {
    const unsigned *pair = reinterpret_cast<const unsigned *>(&kept[n / 2][thread]);
    return unpack(pair[n % 2 * 2 + half]);
}

// What is said of how a chunk's products begin, where nothing is added; `start` is the lane's first.
using Starts = float2[CHUNK / 8];

__device__ inline void read(Starts &starts, const float *start) {
#pragma unroll
    for (int n = 0; n < CHUNK / 8; ++n)
        if (!ADDED) starts[n] = *reinterpret_cast<const float2 *>(start + 8 * n);
}

// As products begin: with 0 for those who take care, who add biases one after the other.
__device__ inline void begin(Products &x, const Starts &starts, bool careful) {
    if constexpr (!ADDED) {
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
            x[n][0] = x[n][2] = starts[n].x, x[n][1] = x[n][3] = starts[n].y;
        if (careful) {
            rarely();
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[n][e] = anew(x[n][e]);
    }
}

// Between warpgroup_begin() and warpgroup_commit(): products with a team's keys from `first` on, as they began or
// with what is to be added.
__device__ inline void multiply_and_mask(Products &x, const Common &shared, const Stage &stage,
                                         const Named<QUERIES> &q, int query, const Named<KEYS> &k, int key,
                                         int first, Kept kept) {
    multiply_rows(x, q, query, k, key + first, !ADDED && kept == SOME_KEPT);
    if (ADDED) add_to_columns(x, shared.halves, stage.mask[ADDED ? key / 64 : 0], first);
}

// sum += p (dp − δ) where something is large or not finite, of products x and dp, for query `number` and the
// eighth after it, and a stage's keys from `key` on. Nothing is added for a query without a key or for a dropped
// key: beside NaN a factor of 0 would not do. Where what is added is WANTED, dp becomes that.
template <bool WANTED>
__device__ inline void add_carefully(float (*sum)[4], const Products &x, Products &dp,
                                     const EvoformerArguments &a, int64 number, const Stage &stage,
                                     int pair, int key, OwnBias pair_bias, int thread) {
    const float2 shift = stage.shift[pair], minus_delta = stage.minus_delta[pair];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Told told = {half == 0 ? shift.x : shift.y, half == 0 ? minus_delta.x : minus_delta.y};
        if (told.dead()) {
#pragma unroll
            for (int n = 0; n < CHUNK / 8; ++n)
                if (WANTED) dp[n][2 * half] = dp[n][2 * half + 1] = 0.0f;
            continue;
        }
        const KeptSoftmax softmax = kept_softmax(a, number + 8 * half);
        const Query of = finished(softmax.top, softmax.total(), 0.0f);
#pragma unroll
        for (int n = 0; n < CHUNK / 8; ++n) {
            const int j = key + 8 * n + 2 * (thread % 4);
            const unsigned kept = stage.kept[j / 32] >> j % 32;
            float2 before = {0.0f, 0.0f};
            if (MASK_BIAS) before = *reinterpret_cast<const float2 *>(stage.bias + j);
            const float2 after = kept_pair_bias(pair_bias, thread, n, half);
            const auto add = [&](int e, float before, float after) {
                const float logit = fmaf(x[n][e], scale_of(a), before) + after;
                const float p = exponential<true>(logit, of.top, of.shift) * of.inverse;
                const bool there = (kept >> e % 2 & 1) != 0;
                const float change = dp[n][e] + told.minus_delta;
                if (there) sum[n][e] = fmaf(p, change, sum[n][e]);
                if (WANTED) dp[n][e] = there ? p * change : 0.0f;
            };
            add(2 * half, before.x, after.x), add(2 * half + 1, before.y, after.y);
        }
    }
}

// Adds up what the blocks that share a tile have of a warp's logits, one after the other. Whether this was
// the last of them.
__device__ inline bool add_up(const EvoformerArguments &a, const Part &place, Sums &sum) {
    const int64 warp = static_cast<int64>(place.tile) * WARPS_MULTIPLYING + threadIdx.x / 32;
    int *turn = a.turns + warp;
    if (lane() == 0)
        while (atomicAdd(turn, 0) < place.part) {}
    __syncwarp();
    __threadfence();
    // A lane's numbers lie one after the other across the warp.
    float *whole = a.pair_bias_sums + warp * (16 * 64) + lane();
    const auto place_of = [=](int n, int e) { return whole + (4 * n + e) * 32; };
    const bool last = place.part + 1 == a.parts;
    if (place.part > 0) {
        Sums before;  // all of them are under way before one is waited for
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) before[n][e] = __ldcg(place_of(n, e));
#pragma unroll
        for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[n][e] += before[n][e];
    }
    if (last) return true;
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) *place_of(n, e) = sum[n][e];
    __threadfence();
    __syncwarp();
    if (lane() == 0) atomicAdd(turn, 1);
    return false;
}

// Writes a warp's sums, of queries from `i` on and keys from `j` on.
__device__ inline void store(const EvoformerArguments &a, const Head &at, int64 i, int64 j,
                             const Sums &sum, unsigned lane) {
    const Operand &x = a.dpair_bias;
    i += lane / 4, j += 2 * (lane % 4);
    Element *to = static_cast<Element *>(x.data) + at.b * x.stride[0] + at.h * x.stride[2] +
                  i * x.stride[3] + j * x.stride[4];
#pragma unroll
    for (int n = 0; n < KEY_TILES; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int down = e / 2 * 8, right = 8 * n + e % 2;
            if (i + down < a.Q && j + right < a.K)
                round_to(sum[n][e], to + down * x.stride[3] + right * x.stride[4]);
        }
}

// For what is always the same, but has no register all the while, nor what is made of it.
__device__ inline int again(const int &x) { return *const_cast<const volatile int *>(&x); }
