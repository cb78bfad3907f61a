// Attention over a sequence on tensor cores: out and lse.
//
// A block does a tile of queries of one head, the keys stream by: those tiles of them in which any
// pair attends. Each warp keeps the running softmax of its own queries, by the algorithm of
// `attention_tiled` of the NumPy reference. Everything is rescaled whenever the largest logit grows,
// however little: then the largest weight is exactly 1, and weights are rounded to 16 bits.

#include "attention_tensor_queries.cuh"

// A shift beyond this has so few digits that the largest weight would not be 1 when rounded to 16 bits,
// and a value that takes all the weight not itself. There the difference of logits is taken first,
// which is an instruction more.
constexpr float LARGE_SHIFT = 1024.0f;

__device__ bool is_large(float shift) { return fabsf(shift) > LARGE_SHIFT; }

// The softmax so far, of each query: Σ 2^(c s − shift) v, the same without v of the lane's keys alone,
// the largest s, and shift = c top.
struct Running {
    Result o;
    PerRow total, top, shift;

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

    // Raises top to the largest of these logits, if that is larger.
    __device__ void raise(const Logits &s, float c) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = top[m][half];
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
                    most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                const float now = most == -infinity() ? 0.0f : most * c;
                const float down =
                    is_large(now) ? (top[m][half] - most) * c : shift[m][half] - now;
                const float by = top[m][half] == -infinity() ? 0.0f : exp2_approximate(down);
                top[m][half] = most, shift[m][half] = now;
                total[m][half] *= by;
#pragma unroll
                for (int n = 0; n < 2 * STEPS; ++n)
                    o[m][n][2 * half] *= by, o[m][n][2 * half + 1] *= by;
            }
    }

    // Logits become weights, and their sum is added to total.
    __device__ void weigh(Logits &s, float c) {
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float largest = top[m][half];
                if (is_large(shift[m][half])) {
                    rarely();
#pragma unroll
                    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e)
                            s[m][n][e] = exp2_approximate((s[m][n][e] - largest) * c);
                } else {
#pragma unroll
                    for (int n = 0; n < CHUNK / 8; ++n)
#pragma unroll
                        for (int e = 2 * half; e < 2 * half + 2; ++e)
                            s[m][n][e] = exp2_approximate(fmaf(s[m][n][e], c, -shift[m][half]));
                }
                float sum = 0.0f;  // by itself: shorter sums round less
#pragma unroll
                for (int n = 0; n < CHUNK / 8; ++n)
                    sum += s[m][n][2 * half] + s[m][n][2 * half + 1];
                total[m][half] += sum;
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    attention_tensor_forward(const AttentionArguments a) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    const int thread = threadIdx.x, row = thread / 32 * OWN;

    // The last queries first: where attention is causal, they have most to do.
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int query_tiles = tiles_of(a.Q, OWNED);
    const int64 first_query = (query_tiles - 1 - block.next(query_tiles)) * OWNED;
    const int64 own_query = first_query + row;
    Head at;
    at.h = block.next(a.H), at.b = block.rest;
    const Head group = group_of(a, at);
    const Sides<false> sides = {a, at.b, first_query};
    Row *own = reinterpret_cast<Row *>(&shared.stage[1]) + row;

    const auto load_tile = [&](int n, int t) { load_keys(shared, a, group, thread, n, t); };

    sides.begin_with(shared.places);
    load_rows<OWN, 32>(own, a, a.q, at, own_query, lane(),
                       [&](int i) { return own_query + i < a.Q; });
    cp_async_commit();
    __syncthreads();
    Visits<false> visits;
    visits.start();
    int now = visits.next(sides, shared.places), next = visits.next(sides, shared.places);
#if PLACES
    write_token(shared, thread, 0, read_token(sides, thread, now));
    write_token(shared, thread, 1, read_token(sides, thread, next));
    __syncthreads();
#endif
    cp_async_wait<0>();
    __syncwarp();
    const Scale scale(a.scale);
    Fragments q;
    load_fragments(q, own);
    apply_sign(q, scale.sign);
    if (now >= 0) load_tile(0, now);
    cp_async_commit();

    Running running;
    running.start();
    for (int n = 0; now >= 0; ++n) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is there, and the one before, or q, has been used
        if (next >= 0) load_tile(n + 1, next);
        cp_async_commit();
        const int after = visits.next(sides, shared.places);
#if PLACES
        const Token ahead = read_token(sides, thread, after);
#endif
        const bool whole = sides.whole(shared.places, now);
        const auto &stage = shared.stage[n % 2];
#pragma unroll 1
        for (int first = 0; first < BLOCK; first += CHUNK) {
            Logits s;
            multiply_over_channels(s, q, stage.k + first);
            if (!whole) {
                rarely();
                sides.hide(s, shared.places, row, now, n, first);
            }
            running.raise(s, scale.c);
            running.weigh(s, scale.c);
            multiply_over_rows(running.o, s, stage.v + first);
        }
#if PLACES
        write_token(shared, thread, n + 2, ahead);
#endif
        now = next, next = after;
    }
    __syncthreads();  // the last tile has been used

#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float &total = running.total[m][half];
            total = over_row(total);
            const int64 i = own_query + 16 * m + lane() / 4 + 8 * half;
            if (a.lse.data == nullptr || i >= a.Q || lane() % 4 != 0) continue;
            // Weights are relative to 2^shift, which is e^(scale · top) but for the rounding of shift,
            // and where that is large, to the latter.
            const float top = running.top[m][half], shift = running.shift[m][half];
            const float rounding = is_large(shift) ? 0.0f : fmaf(top, scale.c, -shift);
            statistic_of(a.lse, at, i) =
                total == 0.0f ? -infinity()
                              : fmaf(top, scale.factor, logf(total) - rounding * LN_2);
        }
    // Not top: a row of nothing but NaN has no largest logit.
    store_rows(
        own, running.o, a, a.out, at, own_query, a.Q,
        [&](int m, int half) { return 1.0f / running.total[m][half]; },
        [&](int m, int half) { return running.total[m][half] != 0.0f; });
}
