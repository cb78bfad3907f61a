// Attention over a sequence, plainly: every case of the contract, forward and backward, in float.
//
// This is the kernel to read first, and the one that the faster ones are compared with. A thread block
// does a tile, the other tokens come by a tile at a time:
//
//   forward           a tile of queries, all keys                  out, lse
//   backward_query    a tile of queries, all keys                  dq
//   backward_key      a tile of keys, all queries of its heads     dk, dv
//
// The backward begins with lse, which the forward gives, and δ (attention_delta.cu). Each sum is made
// by one block, in one order: there are no atomics, and equal calls give equal bits.
//
// A block has TILE × TILE threads. Of a tile of logits, thread (y, x) computes the one of query y and
// key x, and knows whether the two attend to each other; a tile in which no pair does is passed over.
// Of a tile of results, it owns row y and the channels x, x + TILE, x + 2·TILE, …
//
// Defines: ELEMENT (see primitives.cuh), and HEAD_DIM ≥ D, a power of two from 16 to 256: how many
// channels there is room for.

#include "attention_mask.cuh"

constexpr int TILE = HEAD_DIM > 128 ? 8 : 16;  // four tiles of float fit into 48 KiB
constexpr int CHANNELS = HEAD_DIM / TILE;      // of each thread

using Row = float[HEAD_DIM + 1];  // one more, so that the rows of a column lie in different banks
using Square = float[TILE][TILE + 1];

// Reads row y of a tile, one position of x[b, :, h, :]; zeros where it is not wanted. What is not
// wanted is not even read: padding may hold NaN (rule SEQ-4).
__device__ void load(Row *tile, const AttentionArguments &a, const Operand &x, const Head &at,
                     int64 position, bool wanted) {
    const Element *row = channels_of(x, at, position);
    const int D = static_cast<int>(a.D);
    for (int d = threadIdx.x; d < D; d += TILE)
        tile[threadIdx.y][d] = wanted ? to_float(row[d * x.stride[3]]) : 0.0f;
}

__device__ float dot(const Row &x, const Row &y, int64 channels) {
    const int D = static_cast<int>(channels);
    float sum = 0.0f;
    for (int d = 0; d < D; ++d) sum += x[d] * y[d];
    return sum;
}

// Writes a thread's channels of one position of a result; 0 where that is not alive, since beside NaN
// a factor of 0 would not do.
__device__ void store(const float (&sums)[CHANNELS], float factor, bool alive,
                      const AttentionArguments &a, const Operand &x, const Head &at,
                      int64 position) {
    for (int c = 0; c < CHANNELS; ++c) {
        const int64 d = threadIdx.x + c * TILE;
        if (d >= a.D) break;
        const float result = alive ? factor * sums[c] : 0.0f;
        if (a.wide)
            channels_of<float>(x, at, position)[d * x.stride[3]] = result;
        else
            round_to(result, channels_of(x, at, position) + d * x.stride[3]);
    }
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    attention_plain_forward(const AttentionArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE];
    __shared__ Square logits, weights;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 i = block.next(tiles_of(a.Q, TILE)) * TILE + y;
    Head at;
    at.h = block.next(a.H), at.b = block.rest;
    const Head group = group_of(a, at);
    const Sequence keys = keys_of(a, at.b);
    const Token query = queries_of(a, at.b).token(i);

    load(q, a, a.q, at, i, i < a.Q);
    float top = -infinity(), total = 0.0f, o[CHANNELS] = {};
    for (int64 first = 0; first < a.K; first += TILE) {
        const bool sees = attends(a, query, keys.token(first + x));
        if (!__syncthreads_or(sees)) continue;  // and the tile before has been used
        const bool wanted = keys.real(first + y);
        load(k, a, a.k, group, first + y, wanted);
        load(v, a, a.v, group, first + y, wanted);
        __syncthreads();
        logits[y][x] = sees ? a.scale * dot(q[y], k[x], a.D) : -infinity();
        __syncthreads();

        const float before = top;
        for (int j = 0; j < TILE; ++j) top = maximum(top, logits[y][j]);
        const float shift = top == -infinity() ? 0.0f : top;  // −inf − (−inf) would be NaN
        weights[y][x] = expf(logits[y][x] - shift);
        __syncthreads();

        // The tile is summed by itself first: shorter sums round less.
        float sum = 0.0f, part[CHANNELS] = {};
        for (int j = 0; j < TILE; ++j) {
            sum += weights[y][j];
            for (int c = 0; c < CHANNELS; ++c)
                if (x + c * TILE < a.D) part[c] += weights[y][j] * v[j][x + c * TILE];
        }
        const float alpha = expf(before - shift);
        total = alpha * total + sum;
        for (int c = 0; c < CHANNELS; ++c) o[c] = alpha * o[c] + part[c];
    }
    if (i >= a.Q) return;
    const bool alive = top != -infinity();
    for (int c = 0; c < CHANNELS; ++c) o[c] /= total;
    store(o, 1.0f, alive, a, a.out, at, i);
    if (a.lse.data != nullptr && x == 0)
        statistic_of(a.lse, at, i) = alive ? top + logf(total) : -infinity();
}

// What the backward must know of a query.
struct Query {
    float lse, delta;
    bool alive;  // there is such a query, and it has a key left (rule SEQ-5)
};

__device__ Query query_at(const AttentionArguments &a, const Head &at, int64 i) {
    if (i >= a.Q) return {0.0f, 0.0f, false};
    const float lse = statistic_of(a.lse, at, i);
    return {lse, statistic_of(a.delta, at, i), lse != -infinity()};
}

struct Weight {
    float p;   // p_ij
    float ds;  // its logit's gradient, p_ij (ō_i · v_j − δ_i)
};

// Of a pair that does not attend exactly 0, whatever stands beside it.
__device__ Weight weight(const AttentionArguments &a, const Query &query, bool sees, const Row &q,
                         const Row &k, const Row &v, const Row &cotangent) {
    if (!sees) return {0.0f, 0.0f};
    const float p = expf(a.scale * dot(q, k, a.D) - query.lse);
    return {p, p * (dot(cotangent, v, a.D) - query.delta)};
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    attention_plain_backward_query(const AttentionArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    __shared__ Square dlogits;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 i = block.next(tiles_of(a.Q, TILE)) * TILE + y;
    Head at;
    at.h = block.next(a.H), at.b = block.rest;
    const Head group = group_of(a, at);
    const Sequence keys = keys_of(a, at.b);
    const Token place = queries_of(a, at.b).token(i);
    const Query query = query_at(a, at, i);

    load(q, a, a.q, at, i, query.alive);
    load(cotangent, a, a.dout, at, i, query.alive);
    float dq[CHANNELS] = {};
    for (int64 first = 0; first < a.K; first += TILE) {
        const bool sees = query.alive && attends(a, place, keys.token(first + x));
        if (!__syncthreads_or(sees)) continue;
        const bool wanted = keys.real(first + y);
        load(k, a, a.k, group, first + y, wanted);
        load(v, a, a.v, group, first + y, wanted);
        __syncthreads();
        dlogits[y][x] = weight(a, query, sees, q[y], k[x], v[x], cotangent[y]).ds;
        __syncthreads();
        float part[CHANNELS] = {};
        for (int j = 0; j < TILE; ++j)
            for (int c = 0; c < CHANNELS; ++c)
                if (x + c * TILE < a.D) part[c] += dlogits[y][j] * k[j][x + c * TILE];
        for (int c = 0; c < CHANNELS; ++c) dq[c] += part[c];
    }
    if (i < a.Q) store(dq, a.scale, query.alive, a, a.dq, at, i);
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    attention_plain_backward_key(const AttentionArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    __shared__ Square probabilities, dlogits;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first = block.next(tiles_of(a.K, TILE)) * TILE;
    const int64 own = first + y;  // the key whose gradients this thread sums
    Head group;                   // h is the key/value head here
    group.h = block.next(a.G), group.b = block.rest;
    const Sequence keys = keys_of(a, group.b), queries = queries_of(a, group.b);
    const Token key = keys.token(first + x);  // the key of whose logits this thread computes one

    const bool wanted = keys.real(own);
    load(k, a, a.k, group, own, wanted);
    load(v, a, a.v, group, own, wanted);
    float dk[CHANNELS] = {}, dv[CHANNELS] = {};
    const int64 heads = a.H / a.G;
    for (int64 h = group.h * heads; h < (group.h + 1) * heads; ++h) {
        const Head at = {group.b, h};
        for (int64 i = y; i - y < a.Q; i += TILE) {
            const Query query = query_at(a, at, i);
            const bool sees = query.alive && attends(a, queries.token(i), key);
            if (!__syncthreads_or(sees)) continue;
            load(q, a, a.q, at, i, query.alive);
            load(cotangent, a, a.dout, at, i, query.alive);
            __syncthreads();
            const Weight w = weight(a, query, sees, q[y], k[x], v[x], cotangent[y]);
            probabilities[y][x] = w.p, dlogits[y][x] = w.ds;
            __syncthreads();
            float dk_part[CHANNELS] = {}, dv_part[CHANNELS] = {};
            for (int n = 0; n < TILE; ++n)
                for (int c = 0; c < CHANNELS; ++c)
                    if (x + c * TILE < a.D) {
                        dk_part[c] += dlogits[n][y] * q[n][x + c * TILE];
                        dv_part[c] += probabilities[n][y] * cotangent[n][x + c * TILE];
                    }
            for (int c = 0; c < CHANNELS; ++c) dk[c] += dk_part[c], dv[c] += dv_part[c];
        }
    }
    if (own >= a.K) return;
    if (a.dk.data != nullptr) store(dk, a.scale, wanted, a, a.dk, group, own);
    if (a.dv.data != nullptr) store(dv, 1.0f, wanted, a, a.dv, group, own);
}
