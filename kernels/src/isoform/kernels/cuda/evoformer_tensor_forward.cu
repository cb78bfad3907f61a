// Evoformer attention on tensor cores: out and lse.
//
// A block does a tile of queries, of one head, of ROWS rows s at once. WARPS warps share a row's
// queries and the tiles of keys that stream by; the pair bias, of which each lane needs other elements,
// goes from memory into registers, a chunk of keys ahead. Each warp keeps the running softmax of its
// own queries, by the algorithm of `evoformer_attention_tiled` of the NumPy reference. Everything is
// rescaled whenever the largest logit grows, however little: a `top` that lags behind would save a tenth
// of the time, but then the largest weight is no longer exactly 1, and weights are rounded to 16 bits.
//
// What is rare is done by starting again, carefully: operands that are not finite, be it a bias of a
// dropped key, and logits beyond HUGE_LOGIT.

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int QUERIES = WARPS * OWN;
constexpr float LOWEST = -1e30f;  // in place of −∞, as a difference of two such logits is a number

struct Stage {
    Row k[ROWS][BLOCK], v[ROWS][BLOCK];
};

struct Shared {
    Row own[ROWS][QUERIES];  // q, then the gate, then the output
    Stage stage[2];
    Starts starts[4][ROWS];
    Keys keys[4][ROWS];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");
static_assert(BLOCK <= 32 * WARPS && BLOCK % CHUNK == 0 && CHUNK % 32 == 0,
              "a thread looks after one key, and keys are in another order within 32");

// The largest logits of a chunk, of what the lane has of them.
__device__ void largest_of(PerQuery &largest, const float (&s)[M_TILES][CHUNK / 8][4]) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[m][half] = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < CHUNK / 8; ++n)
                largest[m][half] = fmaxf(largest[m][half],
                                         fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
}

// The softmax so far, of each query: Σ e^(s − top) v and Σ e^(s − top), the latter of the lane's keys.
struct Running {
    Result o;
    PerQuery total, top, shift;

    __device__ void start(bool careful) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[m][half] = careful ? -infinity() : LOWEST;
                shift[m][half] = careful ? 0.0f : LOWEST * LOG2_E;
                total[m][half] = 0.0f;
            }
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;
        }
    }

    // Raises top to the largest logit so far.
    template <bool EXACT>
    __device__ void raise(const PerQuery &largest) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = fmaxf(largest[m][half], top[m][half]);
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                float shifted = most * LOG2_E, by = shift[m][half] - shifted;
                if (EXACT) {
                    shifted = most == -infinity() ? 0.0f : shifted;
                    by = (top[m][half] - most) * LOG2_E;
                }
                by = EXACT && top[m][half] == -infinity() ? 0.0f : exp2_approximate(by);
                total[m][half] *= by;
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n)
                    o[m][n][2 * half] *= by, o[m][n][2 * half + 1] *= by;
                top[m][half] = most, shift[m][half] = shifted;
            }
    }

    // Logits become weights, and their sum is added to total.
    template <bool EXACT>
    __device__ void weigh(float (&s)[M_TILES][CHUNK / 8][4]) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum = 0.0f;  // by itself: shorter sums round less
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        s[m][n][e] = exponential<EXACT>(s[m][n][e], top[m][half], shift[m][half]);
                        sum = n == 0 && e % 2 == 0 ? s[m][n][e] : sum + s[m][n][e];
                    }
                total[m][half] += sum;
            }
    }
};

// What of a tile of keys the logits and the output are made of.
struct KeyTile {
    const Row *k, *v;
    const Keys &keys;
    const float4 *starts;
};

// Adds a tile of keys.
template <bool CAREFUL>
__device__ void attend(Running &running, const Fragments &q, const KeyTile &tile,
                       PairBias<CHUNK> &pair_bias, const EvoformerArguments &a) {
#pragma unroll UNROLL
    for (int first = 0; first < BLOCK; first += CHUNK) {
        float s[M_TILES][CHUNK / 8][4];
        if constexpr (CAREFUL)
            careful_logits(s, q, tile.k + first, tile.keys, first, pair_bias, a.scale);
        else
            quick_logits(s, q, tile.k + first, tile.starts + first / 2, pair_bias, a.scale);
        pair_bias.read(a);
        PerQuery largest;
        largest_of(largest, s);
        running.raise<CAREFUL>(largest);
        running.weigh<CAREFUL>(s);
        multiply_over_rows(running.o, s, tile.v + first);
    }
}

// The head of a block's row r, and the first query of its warp w.
struct Place {
    Head at;
    int64 query;
};

__device__ Place place_of(const EvoformerArguments &a, unsigned number, int r, int w) {
    Blocks block = {number};
    Place place;
    place.query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES + w * OWN;
    place.at.h = block.next(a.H);
    place.at.s = block.next(tiles_of(a.S, ROWS)) * ROWS + r;
    place.at.b = block.rest;
    return place;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    evoformer_tensor_forward(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int warp = threadIdx.x / 32, r = warp / WARPS, w = warp % WARPS;
    const int thread = threadIdx.x % (32 * WARPS);  // among those of row r

    Place place = place_of(a, blockIdx.x, r, w);
    const bool present = place.at.s < a.S;
    Row *own = shared.own[r] + w * OWN;

    const auto load_own = [&](const Operand &x) {
        const int queries = present ? clamp(a.Q - place.query, 0, OWN) : 0;
        RowStream<OWN, 32>(a, x, place.at, place.query, lane())(
            own, [=](int row) { return row < queries; });
    };
    const unsigned heads = static_cast<unsigned>(a.H) / static_cast<unsigned>(a.G);
    const Head group = {place.at.b, place.at.s, static_cast<unsigned>(place.at.h) / heads};
    KeyRows<32 * WARPS> load_keys(a, group, thread);
    KeyStream keys(a, place.at, present && thread < BLOCK, key_at(thread));
    PairBias<CHUNK> pair_bias(a, place.at, place.query);
    const auto load_tile = [&](int t) {
        Stage &stage = shared.stage[t % 2];
        load_keys.load(a, stage.k[r], stage.v[r], shared.keys[t % 4][r].kept);
    };

    const int tiles = tiles_of(a.K, BLOCK);
    const float by = 1.0f / a.scale;
    load_own(a.q);
    cp_async_commit();
    Fragments q;
    Running running;
    for (bool careful = !can_start(a.scale), again = false;; careful = again = true) {
        const auto write_keys = [&](int t, const KeyStream::Raw &raw) {
            if (thread >= BLOCK) return;
            write_key(shared.keys[t % 4][r], thread, raw);
            write_start(shared.starts[t % 4][r], thread, raw, by);
        };
        if (again) {  // from the first key
            load_keys.move(a, -tiles), keys.move(a, -tiles - 2);
            pair_bias.move(a, -tiles * BLOCK - CHUNK);
        }
        write_keys(0, keys.read(a));
        write_keys(1, keys.read(a));
        __syncthreads();
        if (tiles > 0) load_tile(0);
        cp_async_commit();
        pair_bias.read(a);
        if (!again) {
            cp_async_wait<1>();
            __syncwarp();
            load_fragments(q, own);
            __syncwarp();
            if (GATED) load_own(a.gate);
        }

        running.start(careful);
        bool misfit = false;
        for (int t = 0; t < tiles; ++t) {
            cp_async_wait<0>();
            __syncthreads();  // the tile is there, and the one before has been used
            if (t + 1 < tiles) load_tile(t + 1);
            cp_async_commit();
            const KeyStream::Raw ahead = keys.read(a);

            const Stage &stage = shared.stage[t % 2];
            const KeyTile tile = {stage.k[r], stage.v[r], shared.keys[t % 4][r],
                                shared.starts[t % 4][r]};
            if (any_kept(tile.keys)) {
                if (careful) {
                    rarely();
                    attend<true>(running, q, tile, pair_bias, a);
                } else {
                    attend<false>(running, q, tile, pair_bias, a);
                    misfit = true;
                }
            } else {
                pair_bias.move(a, BLOCK - CHUNK);
                pair_bias.read(a);
            }
            write_keys(t + 2, ahead);
        }
        if (careful) break;
        bool strange = false;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                strange |= !(fabsf(running.top[m][half]) <= HUGE_LOGIT) ||
                           running.total[m][half] != running.total[m][half];
        if (!__syncthreads_or(misfit && strange)) break;
    }
    if (!present) return;
    cp_async_wait<0>();
    __syncwarp();

    place = place_of(a, blockIdx.x + unknown_zero(), r, w);  // found again: no registers in between
    const Head &at = place.at;
    const int64 own_query = place.query;
    const int queries = clamp(a.Q - own_query, 0, OWN);
    const int64 first = number_of(a, at, own_query);
    float *lse = static_cast<float *>(a.lse.data);
    if (lse != nullptr)
        lse += at.b * a.lse.stride[0] + at.s * a.lse.stride[1] + at.h * a.lse.stride[2] +
               own_query * a.lse.stride[3];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            running.total[m][half] = over_row(running.total[m][half]);
            // Not top: a row of nothing but NaN has no largest logit.
            const bool alive = running.total[m][half] != 0.0f;
            const float top = alive ? running.top[m][half] : -infinity();
            const int row = 16 * m + lane() / 4 + 8 * half;
            if (row < queries && lane() % 4 == 0) {
                if (lse != nullptr)
                    lse[row * a.lse.stride[3]] =
                        alive ? top + logf(running.total[m][half]) : -infinity();
                if (a.top != nullptr) keep_softmax(a, first + row, top, running.total[m][half]);
            }
        }
    if constexpr (GATED) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Element *row = own[16 * m + lane() / 4 + 8 * half];
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n) {
                    const float2 gate = unpack(
                        *reinterpret_cast<const unsigned *>(row + 8 * n + 2 * (lane() % 4)));
                    running.o[m][n][2 * half] *= sigmoid(gate.x);
                    running.o[m][n][2 * half + 1] *= sigmoid(gate.y);
                }
            }
    }
    __syncwarp();
    stage(
        own, running.o, [&](int m, int half) { return 1.0f / running.total[m][half]; },
        [&](int m, int half) { return running.total[m][half] != 0.0f; });
    __syncwarp();
    store_rows(own, a, a.out, at, own_query, a.Q);
}
