// What the tensor-core kernels have in common: tiles in shared memory, products, logits.
//
// Tiles are copied asynchronously, one ahead of the one that is computed with.
//
// Defines: ELEMENT (1 or 2, see primitives.cuh); HEAD_DIM, a multiple of 16 and ≥ D; M_TILES; WARPS,
// how many share a head; BLOCK, the rows of a tile that streams by, and CHUNK, those of them whose
// logits are in registers at a time; UNROLL, how many of these may be interleaved; MASK_BIAS, PAIR_BIAS
// and GATED, whether there are such; ALIGNED and ALIGNED_BIAS, whether rows of all operands, and of the
// pair bias, can be copied 16 bytes at a time; BLOCKS, for how many on a multiprocessor registers must
// do; SHARED_BYTES, what the host asks for.

#pragma once

#include "evoformer_heads.cuh"
#include "tensor_tiles.cuh"

#ifndef BIAS_COLUMNS
#define BIAS_COLUMNS BLOCK
#endif
constexpr int BIAS_PITCH = BIAS_COLUMNS + 8;  // from row to row of a tile of the pair bias
constexpr float HUGE_LOGIT = 1024.0f;  // beyond it, rounding its product with log₂ e is seen in weights

using BiasRow = Element[BIAS_PITCH];

// --- From the operands to shared memory, and back ------------------------------------------------

// Whether pieces of eight elements of the last axis can be copied as 16 bytes.
__device__ inline bool aligned(const Operand &x) {
    const int64 odd = static_cast<int64>(reinterpret_cast<cuda::std::uintptr_t>(x.data)) / 2 |
                      x.stride[0] | x.stride[1] | x.stride[2] | x.stride[3];
    return odd % 8 == 0 && x.stride[4] == 1;
}

// Copies the first `count` of eight elements, zeros for the others. Where 16 bytes are copied at once,
// it is all of them or none.
template <bool BY_16_BYTES>
__device__ inline void copy_piece(Element *target, const Element *source, int64 stride, int count) {
    if constexpr (BY_16_BYTES) {
        cp_async_16(target, source, count > 0);
    } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
            if (e < count)
                target[e] = source[e * stride];
            else
                round_to(0.0f, target + e);
    }
}

// A thread's part in copying one tile after the other: of each, pieces of eight elements at the same
// place of every PASS-th row. Addresses are computed once; from tile to tile they move by `step`.
template <int SIZE, int COLUMNS, int THREADS, bool BY_16_BYTES>
struct Stream {
    static constexpr int PIECES = COLUMNS / 8;
    static constexpr int PASS = THREADS / PIECES;
    static constexpr int PASSES = (SIZE + PASS - 1) / PASS;
    static_assert(PASSES <= 32, "a bit for each");

    const Element *next;  // the thread's first piece of the next tile
    int64 step, pass, stride;
    int row, column;

    __device__ Stream(const Operand &x, const Element *origin, int64 row_stride, int64 step,
                      unsigned thread)
        : step(step), pass(PASS * row_stride), stride(BY_16_BYTES ? 1 : x.stride[4]),
          row(thread / PIECES), column(thread % PIECES * 8) {
        next = origin + row * row_stride + column * stride;
        if (THREADS % PIECES != 0 && row >= PASS) row = SIZE;  // nothing to do
    }

    // A bit for each of the thread's rows: whether it is `wanted`.
    template <class Wanted>
    __device__ unsigned rows_of(const Wanted &wanted) const {
        unsigned rows = 0;
#pragma unroll
        for (int n = 0; n < PASSES; ++n)
            if (is_there(n) && wanted(row + n * PASS)) rows |= 1u << n;
        return rows;
    }

    // Starts to copy the next tile: `count` of eight elements, of those `rows`, and zeros elsewhere.
    // What is not copied is not even read: a dropped key may hold NaN (rule EVO-4).
    template <int PITCH_>
    __device__ void load(Element (*tile)[PITCH_], int count, unsigned rows) {
        const Element *from = next;
#pragma unroll
        for (int n = 0; n < PASSES; ++n) {
            if (!is_there(n)) break;
            copy_piece<BY_16_BYTES>(tile[row + n * PASS] + column, from, stride,
                                    (rows >> n & 1) != 0 ? count : 0);
            from += pass;
        }
        next += step;
    }

  private:
    __device__ bool is_there(int n) const {
        return (SIZE % PASS == 0 && THREADS % PIECES == 0) || row + n * PASS < SIZE;
    }
};

// SIZE positions of x[b, s, :, h, :] at a time.
template <int SIZE, int THREADS>
struct RowStream : Stream<SIZE, HEAD_DIM, THREADS, ALIGNED> {
    int count;

    // From position `first` on, one tile after the other.
    __device__ RowStream(const EvoformerArguments &a, const Operand &x, const Head &at, int64 first,
                         int thread)
        : Stream<SIZE, HEAD_DIM, THREADS, ALIGNED>(x, channels_of(x, at, first), x.stride[2],
                                                   SIZE * x.stride[2], thread),
          count(clamp(a.D - this->column, 0, 8)) {}

    __device__ void operator()(Row *tile, unsigned rows) { this->load(tile, count, rows); }

    template <class Wanted>
    __device__ void operator()(Row *tile, const Wanted &wanted) {
        (*this)(tile, this->rows_of(wanted));
    }
};

// SIZE queries × BIAS_COLUMNS keys of the pair bias at a time, and zeros beyond both; then the next
// keys, or the next queries.
template <int SIZE, int THREADS, bool NEXT_KEYS>
struct PairBiasStream : Stream<SIZE, BIAS_COLUMNS, THREADS, ALIGNED_BIAS> {
    int queries, keys;  // that there still are

    __device__ PairBiasStream(const EvoformerArguments &a, const Head &at, int64 query, int64 key,
                              int thread)
        : Stream<SIZE, BIAS_COLUMNS, THREADS, ALIGNED_BIAS>(
              a.pair_bias, origin(a.pair_bias, at, query, key), a.pair_bias.stride[3],
              NEXT_KEYS ? BIAS_COLUMNS * a.pair_bias.stride[4] : SIZE * a.pair_bias.stride[3],
              thread),
          queries(static_cast<int>(a.Q - query) - this->row),
          keys(static_cast<int>(a.K - key) - this->column) {}

    __device__ void operator()(BiasRow *tile) {
        const int rows = queries, first = this->row;
        this->load(tile, clamp(keys, 0, 8),
                   this->rows_of([=](int at) { return at - first < rows; }));
        if (NEXT_KEYS)
            keys -= BIAS_COLUMNS;
        else
            queries -= SIZE;
    }

  private:
    __device__ static const Element *origin(const Operand &x, const Head &at, int64 query,
                                            int64 key) {
        return static_cast<const Element *>(x.data) + at.b * x.stride[0] + at.h * x.stride[2] +
               query * x.stride[3] + key * x.stride[4];
    }
};

// Writes a warp's rows, which are positions of x[b, s, :, h, :] from `first` on, `end` excluded.
__device__ inline void store_rows(const Row *tile, const EvoformerArguments &a, const Operand &x,
                                  const Head &at, int64 first, int64 end) {
    const bool by_16_bytes = aligned(x);
    for (int piece = lane(); piece < OWN * (HEAD_DIM / 8); piece += 32) {
        const int row = piece / (HEAD_DIM / 8), d = piece % (HEAD_DIM / 8) * 8;
        const int count = clamp(a.D - d, 0, 8);
        if (first + row >= end) break;
        Element *target = channels_of(x, at, first + row) + d * x.stride[4];
        if (by_16_bytes && count == 8)
            *reinterpret_cast<uint4 *>(target) = *reinterpret_cast<const uint4 *>(tile[row] + d);
        else
            for (int e = 0; e < count; ++e) target[e * x.stride[4]] = tile[row][d + e];
    }
}

// Puts a result into the warp's rows of shared memory, row r times factor(r), or 0 where that is not
// alive(r): beside NaN a factor of 0 would not do.
template <class Factor, class Alive>
__device__ inline void stage(Row *tile, const Result &x, Factor factor, Alive alive) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = 16 * m + lane() / 4 + 8 * half;
            const float by = factor(m, half);
            const bool kept = alive(m, half);
#pragma unroll
            for (int n = 0; n < 2 * STEPS; ++n) {
                const float low = x[m][n][2 * half] * by, high = x[m][n][2 * half + 1] * by;
                *reinterpret_cast<unsigned *>(tile[row] + 8 * n + 2 * (lane() % 4)) =
                    kept ? pack(low, high) : 0u;
            }
        }
}

// --- Keys ----------------------------------------------------------------------------------------

// What a tile of keys brings to the logits besides k.
struct Keys {
    unsigned short kept[BLOCK];  // a mask for 16-bit elements: all ones, or 0 where it is dropped
    float bias[BLOCK];           // the mask bias
};

// Keys that a thread reads well before it needs them, one of each tile: what it has read stays as it
// came, so that nobody waits for it.
struct KeyStream {
    const unsigned char *mask;  // null where there is none
    const Element *bias;
    int left;  // keys, from the thread's on

    __device__ KeyStream(const EvoformerArguments &a, const Head &at, bool present, int thread)
        : mask(nullptr), bias(nullptr), left(present ? static_cast<int>(a.K) - thread : 0) {
        if (a.mask.data != nullptr)
            mask = static_cast<const unsigned char *>(a.mask.data) + at.b * a.mask.stride[0] +
                   at.s * a.mask.stride[1] + thread * a.mask.stride[2];
        if (MASK_BIAS)
            bias = static_cast<const Element *>(a.mask_bias.data) + at.b * a.mask_bias.stride[0] +
                   at.s * a.mask_bias.stride[1] + thread * a.mask_bias.stride[4];
    }

    struct Raw {
        unsigned char mask;
        Element bias;
    };

    // The next tile's.
    __device__ Raw read(const EvoformerArguments &a) {
        Raw raw;
        raw.mask = left > 0;
        round_to(0.0f, &raw.bias);
        if (left > 0 && mask != nullptr) raw.mask = *mask;
        if (MASK_BIAS && left > 0) raw.bias = *bias;
        left -= BLOCK;
        if (mask != nullptr) mask += BLOCK * a.mask.stride[2];
        if (MASK_BIAS) bias += BLOCK * a.mask_bias.stride[4];
        return raw;
    }
};

__device__ inline KeyStream::Raw read_raw_key(const EvoformerArguments &a, const Head &at,
                                              bool present, int64 j) {
    return KeyStream(a, at, present, static_cast<int>(j)).read(a);
}

__device__ inline void write_key(Keys &keys, int j, const KeyStream::Raw &raw) {
    keys.kept[j] = raw.mask != 0 ? 0xffff : 0;
    if (MASK_BIAS) keys.bias[j] = raw.mask != 0 ? to_float(raw.bias) : -infinity();
}

// --- Products ------------------------------------------------------------------------------------

// acc[i, j] += Σ_d x[i, d] rows[j, d].
template <int N>
__device__ inline void multiply_over_channels(float (&acc)[M_TILES][N][4], const Fragments &x,
                                              const Row *rows) {
#pragma unroll
    for (int n = 0; n < N; n += 2)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4(words, rows[8 * n + lane() % 8 + 8 * (lane() / 16)] + 16 * step +
                                   8 * (lane() / 8 % 2));
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][n], x[m][step], first);
                mma_m16n8k16<Element>(acc[m][n + 1], x[m][step], second);
            }
        }
}

// The same with x in shared memory, for want of registers.
template <int N>
__device__ inline void multiply_over_channels(float (&acc)[M_TILES][N][4], const Row *x,
                                              const Row *rows) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        unsigned left[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
            ldmatrix_x4(left[m], x[16 * m + lane() % 16] + 16 * step + 8 * (lane() / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned words[4];
            ldmatrix_x4(words, rows[8 * n + lane() % 8 + 8 * (lane() / 16)] + 16 * step +
                                   8 * (lane() / 8 % 2));
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][n], left[m], first);
                mma_m16n8k16<Element>(acc[m][n + 1], left[m], second);
            }
        }
    }
}

// --- Logits of the warp's queries ----------------------------------------------------------------

// What the logits of some keys need besides q.
struct Tile {
    const Row *k;              // the tile's, as all
    const Keys &keys;
    const BiasRow *pair_bias;  // of the warp's queries
};

// s_ij (rule EVO-2) of the keys from `first` on; −inf where one is dropped, whatever k and the biases
// hold.
//
// The pair bias and the mask meet as packed 16-bit elements: a dropped key's bias is replaced by
// −inf, two keys at a time. That is enough unless the product is NaN, which takes a query that is not
// finite, STRANGE: k is read as zeros where it is dropped.
template <bool STRANGE, int N>
__device__ inline void logits(float (&s)[M_TILES][N][4], const Fragments &q, const Tile &tile,
                              int first, float scale) {
    const int pair = first + 2 * (lane() % 4);
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[m][n][e] = 0.0f;
    multiply_over_channels(s, q, tile.k + first);

#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned kept[2];
        float2 mask_bias[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int key = pair + 8 * (n + i);
            kept[i] = *reinterpret_cast<const unsigned *>(tile.keys.kept + key);
            if (MASK_BIAS)
                mask_bias[i] = *reinterpret_cast<const float2 *>(tile.keys.bias + key);
        }
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            unsigned bias[4] = {0, 0, 0, 0};  // rows, rows + 8; then the next eight keys
            if (PAIR_BIAS)
                ldmatrix_x4(bias, tile.pair_bias[16 * m + lane() % 16] + first + 8 * n +
                                      8 * (lane() / 16));
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                float *logit = &s[m][n + part / 2][part % 2 * 2];
                const unsigned keep = kept[part / 2];
                const float2 add = unpack((bias[part] & keep) | (~keep & MINUS_INFINITIES));
                if (MASK_BIAS) {
                    logit[0] = fmaf(logit[0], scale, mask_bias[part / 2].x) + add.x;
                    logit[1] = fmaf(logit[1], scale, mask_bias[part / 2].y) + add.y;
                } else {
                    logit[0] = fmaf(logit[0], scale, add.x);
                    logit[1] = fmaf(logit[1], scale, add.y);
                }
            }
        }
    }
    if constexpr (STRANGE) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (tile.keys.kept[pair + 8 * n + e % 2] == 0)
#pragma unroll
                    for (int m = 0; m < M_TILES; ++m) s[m][n][e] = -infinity();
    }
}

// Whether any key of the tile is kept.
__device__ inline bool any_kept(const Keys &keys) {
    bool found = false;
#pragma unroll
    for (int j = 0; j < BLOCK; j += 32) found |= keys.kept[j + lane()] != 0;
    return __any_sync(ALL_LANES, found);
}

// Whether any of the warp's elements is NaN or ±inf.
__device__ inline bool any_not_finite(const Fragments &x) {
    constexpr unsigned exponent = MINUS_INFINITIES & 0x7fff7fffu;
    bool found = false;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const unsigned bits = x[m][step][part] & exponent;
                found |= (bits & 0xffffu) == (exponent & 0xffffu) || bits >> 16 == exponent >> 16;
            }
    return __any_sync(ALL_LANES, found);
}

using PerQuery = float[M_TILES][2];  // of rows lane / 4 and lane / 4 + 8 of each sixteen

// e^(s − top), by way of 2^(s log₂ e − shift) with shift = top log₂ e: one instruction less. Beyond
// HUGE_LOGIT, EXACT takes the difference first. A query without a logit has top −inf and shift 0.
template <bool EXACT>
__device__ inline float exponential(float s, float top, float shift) {
    if (EXACT) return exp2_approximate((s - (top == -infinity() ? 0.0f : top)) * LOG2_E);
    return exp2_approximate(fmaf(s, LOG2_E, -shift));
}

// --- Gradients -----------------------------------------------------------------------------------

// The gradients of logits are rounded to be multiplied again. bfloat16 has the range of float; for
// float16 (rule EVO-7) they are kept in units of a power of two, `unit`, which starts tiny and grows
// when one of them does not fit, with what was summed in it.
template <int N>
__device__ inline void keep_in_range(float (&ds)[M_TILES][N][4], float &unit, Result &sum) {
#if ELEMENT == 1
    float most = 0.0f;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) most = fmaxf(most, fabsf(ds[m][n][e]));
    if (!__any_sync(ALL_LANES, most > 32768.0f)) return;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, distance));
    if (isinf(most)) {  // one of them is infinite by right; the largest of the others
        most = 0.0f;
#pragma unroll
        for (int m = 0; m < M_TILES; ++m)
#pragma unroll
            for (int n = 0; n < N; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (!isinf(ds[m][n][e])) most = fmaxf(most, fabsf(ds[m][n][e]));
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, distance));
        if (most <= 32768.0f) return;
    }
    const float by = exp2f(8.0f - ceilf(log2f(most)));  // the largest becomes about 2^8
    unit /= by;
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) ds[m][n][e] *= by;
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[m][n][e] *= by;
    }
#endif
}

// dO becomes ō = dO ∘ σ(gate), rounded: of the pieces that this thread itself has loaded.
template <class Loaded>
__device__ inline void close_gate(Row *cotangent, const Row *gate, int size, const Loaded &loaded) {
    for (int row = loaded.row; row < size; row += Loaded::PASS) {
        unsigned *words = reinterpret_cast<unsigned *>(cotangent[row] + loaded.column);
        const unsigned *gates = reinterpret_cast<const unsigned *>(gate[row] + loaded.column);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float2 dy = unpack(words[e]), g = unpack(gates[e]);
            words[e] = pack(dy.x * sigmoid(g.x), dy.y * sigmoid(g.y));
        }
    }
}

// What the forward leaves of a query takes 7 bytes: top, a float, and total in three. As top is the
// largest logit, total is 1 and something, or a rounding error less: the difference is kept, rounded to
// 24 bits. Where one key takes all it is small, and the gradients, which cancel then, see nothing of
// that; elsewhere it is 2^−17 of total. A query without a key has total 0.
__device__ inline void keep_softmax(const EvoformerArguments &a, int64 n, float top, float total) {
    const float x = total - 1.0f;
    const unsigned code = x != x ? 0x7fc000u : (__float_as_uint(x) + 0x80u) >> 8;
    a.top[n] = top;
    a.total_code[n] = static_cast<uint16>(code & 0xffffu);
    a.total_more[n] = static_cast<uint8>(code >> 16);
}

// As it is kept, so that nobody waits for it who does not need it yet.
struct KeptSoftmax {
    float top;
    uint16 code;
    uint8 more;

    __device__ float total() const {
        return 1.0f + __uint_as_float((code | static_cast<unsigned>(more) << 16) << 8);
    }
};

__device__ inline KeptSoftmax kept_softmax(const EvoformerArguments &a, int64 n) {
    return {a.top[n], a.total_code[n], a.total_more[n]};
}

// Of a query that is not there, or without a key: total is 0.
__device__ inline KeptSoftmax no_softmax(float top) { return {top, 0x8000u, 0xbfu}; }

// What the backward must know of a query besides q and ō. Of one without a key, all are 0 but top.
struct alignas(16) Query {
    float top, shift, inverse, delta;  // inverse = 1 / Σ_j e^(s_ij − top)
};

struct RawQuery {
    KeptSoftmax softmax;
    float delta;
};

__device__ inline RawQuery read_query(const EvoformerArguments &a, const Head &at, bool there,
                                      int64 i) {
    if (!there || i >= a.Q) return {no_softmax(0.0f), 0.0f};
    const int64 n = number_of(a, at, i);
    return {kept_softmax(a, n), a.delta[n]};
}

__device__ inline Query finished(float top, float total, float delta) {
    if (total == 0.0f) return {0.0f, 0.0f, 0.0f, 0.0f};
    return {top, top == -infinity() ? 0.0f : top * LOG2_E, 1.0f / total, delta};
}

__device__ inline Query finished(const RawQuery &raw) {
    return finished(raw.softmax.top, raw.softmax.total(), raw.delta);
}
