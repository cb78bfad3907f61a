// Evoformer attention on tensor cores: out and lse.
//
// A block does a tile of queries, of one head, of ROWS rows s at once: they share the tile of the
// pair bias, which is the largest thing to be read. WARPS warps share a row's queries, and each keeps
// the running softmax of its own, by the algorithm of `evoformer_attention_tiled` of the NumPy
// reference. Everything is rescaled whenever the largest logit grows, however little: a `top` that
// lags behind would save a tenth of the time, but then the largest weight is no longer exactly 1, and
// weights are rounded to 16 bits.
//
// What is rare is done by starting again, carefully: operands that are not finite, and logits beyond
// HUGE_LOGIT.

#include "evoformer_tensor.cuh"

constexpr int THREADS = 32 * WARPS * ROWS;
constexpr int QUERIES = WARPS * OWN;

struct Stage {
    Row k[ROWS][BLOCK], v[ROWS][BLOCK];
    BiasRow pair_bias[QUERIES];
};

struct Shared {
    Row own[ROWS][QUERIES];  // q, then the gate, then the output
    Stage stage[2];
    Keys keys[4][ROWS];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

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

    __device__ void start() {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                top[m][half] = -infinity(), shift[m][half] = total[m][half] = 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;
        }
    }

    __device__ void rescale(int m, int half, float by) {
        total[m][half] *= by;
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n) o[m][n][2 * half] *= by, o[m][n][2 * half + 1] *= by;
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
                const float shifted = most == -infinity() ? 0.0f : most * LOG2_E;
                const float by =
                    EXACT ? (top[m][half] - most) * LOG2_E : shift[m][half] - shifted;
                rescale(m, half, top[m][half] == -infinity() ? 0.0f : exp2_approximate(by));
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
                        sum += s[m][n][e];
                    }
                total[m][half] += sum;
            }
    }
};

// Adds a tile of keys.
template <bool CAREFUL>
__device__ void attend(Running &running, const Fragments &q, const Tile &tile, const Row *v,
                       float scale) {
#pragma unroll UNROLL
    for (int first = 0; first < BLOCK; first += CHUNK) {
        float s[M_TILES][CHUNK / 8][4];
        logits<CAREFUL>(s, q, tile, first, scale);
        PerQuery largest;
        largest_of(largest, s);
        running.raise<CAREFUL>(largest);
        running.weigh<CAREFUL>(s);
        multiply_over_rows(running.o, s, v + first);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    evoformer_tensor_forward(const EvoformerArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int warp = threadIdx.x / 32, r = warp / WARPS, w = warp % WARPS;
    const int thread = threadIdx.x % (32 * WARPS);  // among those of row r

#if GATED
    Tiles block = {static_cast<int64>(blockIdx.x)};  // shorter ones would make the compiler spill
#else
    Blocks block = {blockIdx.x};
#endif
    const int64 first_query = block.next(tiles_of(a.Q, QUERIES)) * QUERIES;
    const int64 own_query = first_query + w * OWN;
    Head at;
    at.h = block.next(a.H), at.s = block.next(tiles_of(a.S, ROWS)) * ROWS + r, at.b = block.rest;
    const bool present = at.s < a.S;
    // To find it takes divisions, and elsewhere registers.
    const Head group = !GATED && a.H == a.G ? at : group_of(a, at);
    Row *own = shared.own[r] + w * OWN;

    const auto there = [&](int row) { return present && own_query + row < a.Q; };
    using Rows = RowStream<BLOCK, 32 * WARPS>;
    using BiasStream = PairBiasStream<QUERIES, THREADS, true>;
    Rows load_k(a, a.k, group, 0, thread), load_v(a, a.v, group, 0, thread);
    BiasStream load_pair_bias(a, at, first_query, 0, threadIdx.x);
    const auto load_own = [&](const Operand &x) {
        RowStream<OWN, 32>(a, x, at, own_query, lane())(own, there);
    };
    const auto load_tile = [&](int t) {
        Stage &stage = shared.stage[t % 2];
        const unsigned short *kept = shared.keys[t % 4][r].kept;
        const unsigned rows = load_k.rows_of([&](int row) { return kept[row] != 0; });
        load_k(stage.k[r], rows);
        load_v(stage.v[r], rows);
        if (PAIR_BIAS) load_pair_bias(stage.pair_bias);
    };

    const int tiles = tiles_of(a.K, BLOCK);
    load_own(a.q);
    Fragments q;
    Running running;
    for (bool careful = false;; careful = true) {
        KeyStream keys(a, at, present && thread < BLOCK, thread);
        if (thread < BLOCK) {
            write_key(shared.keys[0][r], thread, keys.read(a));
            write_key(shared.keys[1][r], thread, keys.read(a));
        }
        __syncthreads();
        load_k = Rows(a, a.k, group, 0, thread), load_v = Rows(a, a.v, group, 0, thread);
        load_pair_bias = BiasStream(a, at, first_query, 0, threadIdx.x);
        if (tiles > 0) load_tile(0);
        cp_async_commit();

        running.start();
        bool misfit = false;
        for (int t = 0; t < tiles; ++t) {
            cp_async_wait<0>();
            __syncthreads();  // the tile is there, and the one before has been used
            if (t == 0 && !careful) {
                load_fragments(q, own);
                misfit = any_not_finite(q);
                __syncwarp();
                if (GATED) load_own(a.gate);
            }
            if (t + 1 < tiles) load_tile(t + 1);
            cp_async_commit();
            const KeyStream::Raw ahead = keys.read(a);

            const Stage &stage = shared.stage[t % 2];
            const Tile tile = {stage.k[r], shared.keys[t % 4][r], stage.pair_bias + w * OWN};
            if (any_kept(tile.keys)) {
                if (careful) {
                    rarely();
                    attend<true>(running, q, tile, stage.v[r], a.scale);
                } else
                    attend<false>(running, q, tile, stage.v[r], a.scale);
            }
            if (thread < BLOCK) write_key(shared.keys[(t + 2) % 4][r], thread, ahead);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                misfit |= fabsf(running.top[m][half]) > HUGE_LOGIT &&
                          running.top[m][half] != -infinity();
        if (careful || !__syncthreads_or(misfit)) break;
    }
    if (!present) return;
    cp_async_wait<0>();
    __syncwarp();

#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            running.total[m][half] = over_row(running.total[m][half]);
            // Not top: a row of nothing but NaN has no largest logit.
            const bool alive = running.total[m][half] != 0.0f;
            const int64 i = own_query + 16 * m + lane() / 4 + 8 * half;
            if (i < a.Q && lane() % 4 == 0) {
                if (a.lse.data != nullptr) {
                    float *lse = static_cast<float *>(a.lse.data) + at.b * a.lse.stride[0] +
                                 at.s * a.lse.stride[1] + at.h * a.lse.stride[2] +
                                 i * a.lse.stride[3];
                    *lse = alive ? running.top[m][half] + logf(running.total[m][half]) : -infinity();
                }
                if (a.top != nullptr)
                    keep_softmax(a, number_of(a, at, i), running.top[m][half],
                                 running.total[m][half]);
            }
            if constexpr (GATED) {
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
