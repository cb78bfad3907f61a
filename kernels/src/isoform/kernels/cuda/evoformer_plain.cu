// Evoformer attention, plainly: every case of the contract, forward and backward, in float.
//
// This is the kernel to read first, and the one that the faster ones are compared with. It is
// `evoformer_attention_tiled` of the NumPy reference (isoform/reference/numpy/evoformer_tiled.py)
// with a thread block for each tile:
//
//   forward                     a tile of queries, all keys                   out, lse
//   backward_query              a tile of queries, all keys, twice            dq, dgate; top, total, δ
//   backward_key                a tile of keys, all queries of its heads      dk, dv
//   backward_mask_bias          a tile of keys, all queries of all heads      dmask_bias
//   backward_pair_bias          a tile of queries × keys, all rows            dpair_bias
//
// Each sum is made by one block, in one order: there are no atomics, and equal calls give equal bits.
// The price is that the three last kernels each compute the logits again.
//
// A block has TILE × TILE threads. Of a tile of logits, thread (y, x) computes the one of query y
// and key x. Of a tile of results, it owns row y and the channels x, x + TILE, x + 2·TILE, …
//
// Defines: ELEMENT (see primitives.cuh), and HEAD_DIM ≥ D, a power of two from 16 to 256: how many
// channels there is room for.

#include "evoformer_heads.cuh"

constexpr int TILE = HEAD_DIM > 128 ? 8 : 16;  // four tiles of float fit into 48 KiB
constexpr int CHANNELS = HEAD_DIM / TILE;      // of each thread

using Row = float[HEAD_DIM + 1];  // one more, so that the rows of a column lie in different banks
using Square = float[TILE][TILE + 1];

// --- Reading operands ----------------------------------------------------------------------------

// Reads row y of a tile, one position of x[b, s, :, h, :]; zeros where it is not wanted. What is not
// wanted is not even read: a dropped key may hold NaN (rule EVO-4).
__device__ void load(Row *tile, const EvoformerArguments &a, const Operand &x, const Head &at,
                     int64 position, bool wanted) {
    const Element *row = channels_of(x, at, position);
    const int D = static_cast<int>(a.D);
    for (int d = threadIdx.x; d < D; d += TILE)
        tile[threadIdx.y][d] = wanted ? to_float(row[d * x.stride[4]]) : 0.0f;
}

// Likewise ō = ȳ ∘ σ(gate), the gradient of the output before the gate (rule EVO-8).
__device__ void load_cotangent(Row *tile, const EvoformerArguments &a, const Head &at, int64 i,
                               bool wanted) {
    load(tile, a, a.dout, at, i, wanted);
    if (a.gate.data == nullptr || !wanted) return;
    const Element *gate = channels_of(a.gate, at, i);
    const int D = static_cast<int>(a.D);
    for (int d = threadIdx.x; d < D; d += TILE)
        tile[threadIdx.y][d] *= sigmoid(to_float(gate[d * a.gate.stride[4]]));
}

// --- One logit, and its gradient -----------------------------------------------------------------

__device__ float dot(const Row &x, const Row &y, int64 channels) {
    const int D = static_cast<int>(channels);
    float sum = 0.0f;
    for (int d = 0; d < D; ++d) sum += x[d] * y[d];
    return sum;
}

// s_ij (rule EVO-2), or −inf where there is no such query or the key is dropped.
__device__ float logit(const EvoformerArguments &a, const Head &at, int64 i, int64 j, const Row &q,
                       const Row &k) {
    if (i >= a.Q || !kept(a, at, j)) return -infinity();
    float s = a.scale * dot(q, k, a.D);
    s += mask_bias_of(a, at, j);
    if (a.pair_bias.data != nullptr) {
        const Operand &x = a.pair_bias;
        const Element *bias = static_cast<const Element *>(x.data);
        s += to_float(bias[at.b * x.stride[0] + at.h * x.stride[2] + i * x.stride[3] +
                           j * x.stride[4]]);
    }
    return s;
}

// What the backward must know of a query. Not lse: beside a large top it has no room for log total.
struct Query {
    float top, total, delta;
    bool alive;  // there is such a query, and it has a key left (rule EVO-5)
};

__device__ Query query(const EvoformerArguments &a, const Head &at, int64 i) {
    if (i >= a.Q) return {0.0f, 1.0f, 0.0f, false};
    const int64 n = number_of(a, at, i);
    return {a.top[n], a.total[n], a.delta[n], a.top[n] != -infinity()};
}

struct Weight {
    float p;   // p_ij
    float ds;  // its logit's gradient, p_ij (ō_i · v_j − δ_i)
};

// Of a query without a key, and of a dropped key, exactly 0, whatever stands beside them.
__device__ Weight weight(const EvoformerArguments &a, const Head &at, const Query &query, int64 i,
                         int64 j, const Row &q, const Row &k, const Row &v, const Row &cotangent) {
    if (!query.alive || !kept(a, at, j)) return {0.0f, 0.0f};
    const float p = expf(logit(a, at, i, j, q, k) - query.top) / query.total;
    return {p, p * (dot(cotangent, v, a.D) - query.delta)};
}

// --- Attention of a tile of queries: the online softmax -------------------------------------------

struct Attended {
    float top, total;
    float o[CHANNELS];  // not gated
};

// For query i of row y: the same in each thread of the row, but for the channels.
__device__ Attended attend(const EvoformerArguments &a, const Head &at, int64 i, const Row *q, Row *k,
                           Row *v, Square &logits, Square &weights) {
    const int x = threadIdx.x, y = threadIdx.y;
    Attended result = {-infinity(), 0.0f, {}};
    for (int64 first = 0; first < a.K; first += TILE) {
        __syncthreads();  // the tile before has been used
        const bool wanted = kept(a, at, first + y);
        load(k, a, a.k, group_of(a, at), first + y, wanted);
        load(v, a, a.v, group_of(a, at), first + y, wanted);
        __syncthreads();
        logits[y][x] = logit(a, at, i, first + x, q[y], k[x]);
        __syncthreads();

        float top = result.top;
        for (int j = 0; j < TILE; ++j) top = maximum(top, logits[y][j]);
        const float shift = top == -infinity() ? 0.0f : top;  // −inf − (−inf) would be NaN
        weights[y][x] = expf(logits[y][x] - shift);
        __syncthreads();

        // The tile is summed by itself first: shorter sums round less.
        float total = 0.0f, o[CHANNELS] = {};
        for (int j = 0; j < TILE; ++j) {
            total += weights[y][j];
            for (int c = 0; c < CHANNELS; ++c)
                if (x + c * TILE < a.D) o[c] += weights[y][j] * v[j][x + c * TILE];
        }
        const float alpha = expf(result.top - shift);
        result.total = alpha * result.total + total;
        for (int c = 0; c < CHANNELS; ++c) result.o[c] = alpha * result.o[c] + o[c];
        result.top = top;
    }
    for (int c = 0; c < CHANNELS; ++c)
        result.o[c] = result.top == -infinity() ? 0.0f : result.o[c] / result.total;
    return result;
}

// --- The kernels ----------------------------------------------------------------------------------

__device__ int64 tiles(int64 length) { return (length + TILE - 1) / TILE; }

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    evoformer_plain_forward(const EvoformerArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE];
    __shared__ Square logits, weights;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 i = block.next(tiles(a.Q)) * TILE + threadIdx.y;
    Head at;
    at.h = block.next(a.H), at.s = block.next(a.S), at.b = block.rest;

    load(q, a, a.q, at, i, i < a.Q);
    const Attended result = attend(a, at, i, q, k, v, logits, weights);
    if (i >= a.Q) return;

    const bool alive = result.top != -infinity();
    for (int c = 0; c < CHANNELS; ++c) {
        const int64 d = threadIdx.x + c * TILE;
        if (d >= a.D) break;
        float out = result.o[c];
        if (a.gate.data != nullptr && alive)
            out *= sigmoid(to_float(channels_of(a.gate, at, i)[d * a.gate.stride[4]]));
        round_to(out, channels_of(a.out, at, i) + d * a.out.stride[4]);
    }
    if (a.lse.data != nullptr && threadIdx.x == 0) {
        float *lse = static_cast<float *>(a.lse.data) + at.b * a.lse.stride[0] +
                     at.s * a.lse.stride[1] + at.h * a.lse.stride[2] + i * a.lse.stride[3];
        *lse = alive ? result.top + logf(result.total) : -infinity();
    }
}

// The output before the gate is not kept by the forward: it is computed again here, in float, so
// that δ is not taken from a rounded one.
extern "C" __global__ void __launch_bounds__(TILE *TILE)
    evoformer_plain_backward_query(const EvoformerArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    __shared__ Square logits, weights;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 i = block.next(tiles(a.Q)) * TILE + y;
    Head at;
    at.h = block.next(a.H), at.s = block.next(a.S), at.b = block.rest;

    load(q, a, a.q, at, i, i < a.Q);
    const Attended result = attend(a, at, i, q, k, v, logits, weights);
    Query self = {result.top, result.total, 0.0f, i < a.Q && result.top != -infinity()};

    // δ_i = ō_i · o_i, added in the order in which ō_i · v_j will be: where a query has one key only,
    // o is its v, and the two cancel to the last bit.
    __syncthreads();  // the last values have been used
    load_cotangent(cotangent, a, at, i, self.alive);
    for (int c = 0; c < CHANNELS; ++c) v[y][x + c * TILE] = result.o[c];
    __syncthreads();
    self.delta = dot(cotangent[y], v[y], a.D);

    if (i < a.Q && x == 0) {
        const int64 n = number_of(a, at, i);
        a.top[n] = self.top, a.total[n] = self.total, a.delta[n] = self.delta;
    }
    if (a.dgate.data != nullptr && i < a.Q) {
        for (int c = 0; c < CHANNELS; ++c) {
            const int64 d = x + c * TILE;
            if (d >= a.D) break;
            float dgate = 0.0f;
            if (self.alive) {
                const float dy = to_float(channels_of(a.dout, at, i)[d * a.dout.stride[4]]);
                const float g = to_float(channels_of(a.gate, at, i)[d * a.gate.stride[4]]);
                dgate = dy * result.o[c] * sigmoid(g) * sigmoid(-g);  // 1 − σ(g) would cancel
            }
            round_to(dgate, channels_of(a.dgate, at, i) + d * a.dgate.stride[4]);
        }
    }
    if (a.dq.data == nullptr) return;

    float dq[CHANNELS] = {};
    for (int64 first = 0; first < a.K; first += TILE) {
        __syncthreads();
        const bool wanted = kept(a, at, first + y);
        load(k, a, a.k, group_of(a, at), first + y, wanted);
        load(v, a, a.v, group_of(a, at), first + y, wanted);
        __syncthreads();
        weights[y][x] = weight(a, at, self, i, first + x, q[y], k[x], v[x], cotangent[y]).ds;
        __syncthreads();
        float part[CHANNELS] = {};
        for (int j = 0; j < TILE; ++j)
            for (int c = 0; c < CHANNELS; ++c)
                if (x + c * TILE < a.D) part[c] += weights[y][j] * k[j][x + c * TILE];
        for (int c = 0; c < CHANNELS; ++c) dq[c] += part[c];
    }
    if (i >= a.Q) return;
    for (int c = 0; c < CHANNELS; ++c) {
        const int64 d = x + c * TILE;
        if (d < a.D)
            round_to(self.alive ? a.scale * dq[c] : 0.0f,
                     channels_of(a.dq, at, i) + d * a.dq.stride[4]);
    }
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    evoformer_plain_backward_key(const EvoformerArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    __shared__ Square probabilities, dlogits;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first = block.next(tiles(a.K)) * TILE;
    const int64 own = first + y;  // the key whose gradients this thread sums
    Head group;                   // h is the key/value head here
    group.h = block.next(a.G), group.s = block.next(a.S), group.b = block.rest;

    const bool wanted = kept(a, group, own);
    load(k, a, a.k, group, own, wanted);
    load(v, a, a.v, group, own, wanted);

    float dk[CHANNELS] = {}, dv[CHANNELS] = {};
    const int64 heads = a.H / a.G;
    for (int64 h = group.h * heads; h < (group.h + 1) * heads; ++h) {
        const Head at = {group.b, group.s, h};
        for (int64 i = y; i - y < a.Q; i += TILE) {
            const Query self = query(a, at, i);
            __syncthreads();
            load(q, a, a.q, at, i, self.alive);
            load_cotangent(cotangent, a, at, i, self.alive);
            __syncthreads();
            const Weight w = weight(a, at, self, i, first + x, q[y], k[x], v[x], cotangent[y]);
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
    for (int c = 0; c < CHANNELS; ++c) {
        const int64 d = x + c * TILE;
        if (d >= a.D) break;
        // For a dropped key the sums may be NaN, 0 times what was attended to beside it.
        if (a.dk.data != nullptr)
            round_to(wanted ? a.scale * dk[c] : 0.0f,
                     channels_of(a.dk, group, own) + d * a.dk.stride[4]);
        if (a.dv.data != nullptr)
            round_to(wanted ? dv[c] : 0.0f, channels_of(a.dv, group, own) + d * a.dv.stride[4]);
    }
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    evoformer_plain_backward_mask_bias(const EvoformerArguments a) {
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    __shared__ Square sums;
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first = block.next(tiles(a.K)) * TILE;
    Head at;
    at.s = block.next(a.S), at.b = block.rest;

    float sum = 0.0f;  // over all heads, and over every TILE-th query from y on
    for (at.h = 0; at.h < a.H; ++at.h) {
        for (int64 i = y; i - y < a.Q; i += TILE) {
            const Query self = query(a, at, i);
            __syncthreads();
            if (i == y) {  // a new head
                const bool wanted = kept(a, at, first + y);
                load(k, a, a.k, group_of(a, at), first + y, wanted);
                load(v, a, a.v, group_of(a, at), first + y, wanted);
            }
            load(q, a, a.q, at, i, self.alive);
            load_cotangent(cotangent, a, at, i, self.alive);
            __syncthreads();
            sum += weight(a, at, self, i, first + x, q[y], k[x], v[x], cotangent[y]).ds;
        }
    }
    sums[y][x] = sum;
    __syncthreads();
    if (y > 0 || first + x >= a.K) return;
    for (int n = 1; n < TILE; ++n) sum += sums[n][x];
    const Operand &out = a.dmask_bias;
    round_to(sum, static_cast<Element *>(out.data) + at.b * out.stride[0] + at.s * out.stride[1] +
                      (first + x) * out.stride[4]);
}

extern "C" __global__ void __launch_bounds__(TILE *TILE)
    evoformer_plain_backward_pair_bias(const EvoformerArguments a) {
    constexpr int64 SHORT = 64;  // terms of a partial sum: about the root of the most rows there are
    __shared__ Row q[TILE], k[TILE], v[TILE], cotangent[TILE];
    const int x = threadIdx.x, y = threadIdx.y;
    Tiles block = {static_cast<int64>(blockIdx.x)};
    const int64 first = block.next(tiles(a.K)) * TILE;
    const int64 i = block.next(tiles(a.Q)) * TILE + y;
    Head at;
    at.h = block.next(a.H), at.b = block.rest;

    float sum = 0.0f, part = 0.0f;
    for (at.s = 0; at.s < a.S; ++at.s) {
        const Query self = query(a, at, i);
        const bool wanted = kept(a, at, first + y);
        __syncthreads();
        load(q, a, a.q, at, i, self.alive);
        load(k, a, a.k, group_of(a, at), first + y, wanted);
        load(v, a, a.v, group_of(a, at), first + y, wanted);
        load_cotangent(cotangent, a, at, i, self.alive);
        __syncthreads();
        part += weight(a, at, self, i, first + x, q[y], k[x], v[x], cotangent[y]).ds;
        if (at.s % SHORT == SHORT - 1) sum += part, part = 0.0f;
    }
    if (i >= a.Q || first + x >= a.K) return;
    const Operand &out = a.dpair_bias;
    round_to(sum + part, static_cast<Element *>(out.data) + at.b * out.stride[0] +
                             at.h * out.stride[2] + i * out.stride[3] +
                             (first + x) * out.stride[4]);
}
