// Rotary embedding of queries and keys, in one launch; forward, and backward by the opposite angle.
//
// The kernel must do little else than read x and write it turned, so angles are not read from a
// table, which would be traffic too (docs/decisions). They are computed here, once for all heads
// of a token, and exactly: what a position p turns a pair by, in whole turns, is p times an integer
// over 2^128, and what is left of it modulo 1 are the low 128 bits of that product, whatever p. A
// block has some tokens:
//
//   1. where each token's rows lie, and its position              a thread for each token
//   2. cosine and sine of each of their angles, to shared memory  a thread for each token and pair
//   3. rows are read, turned and written                          a thread for each pair of vectors
//
// A *unit* of a row is what a thread turns at a time: two vectors of WIDTH elements, with WIDTH
// pairs in them. The next units are the next threads', so a warp reads whole rows of several heads.
//
// Defines: ELEMENT (see primitives.cuh); WIDTH, elements of a vector, so many that rows and halves of
// rows start on a multiple of their size: 1, 2, 4 or 8, 16 bytes at most; INTERLEAVED, 1 for pairs
// (2i, 2i + 1), 0 for pairs (i, i + d/2).

#include "primitives.cuh"
#include "rotary_arguments.cuh"

constexpr int THREADS = 256;

// Blocks of a multiprocessor, so many that what they read hides the latency of memory.
#if __CUDA_ARCH__ == 750 || __CUDA_ARCH__ >= 1000
constexpr int TOGETHER = 4;  // all threads that a Turing can have; with five, a Blackwell's spill
#else
constexpr int TOGETHER = 5;
#endif

struct alignas(WIDTH * sizeof(Element)) Vector {
    Element at[WIDTH];
};

struct alignas(16) Widest {
    Element at[16 / sizeof(Element)];
};

struct alignas(WIDTH < 4 ? WIDTH * sizeof(float) : 16) Floats {
    float at[WIDTH];
};

// --- Angles ---------------------------------------------------------------------------------------

struct Position {
    uint64 magnitude;
    bool negative;
};

__device__ inline Position position_of(const RotaryArguments &a, int64 b, int64 l) {
    const int64 n = b * a.positions.stride[0] + l * a.positions.stride[1];
    const void *data = a.positions.data;
    using namespace cuda::std;
    int64 p;
    switch (a.position_bytes) {
        case 1: p = a.position_signed ? int64(static_cast<const int8_t *>(data)[n])
                                      : int64(static_cast<const uint8_t *>(data)[n]); break;
        case 2: p = a.position_signed ? int64(static_cast<const int16_t *>(data)[n])
                                      : int64(static_cast<const uint16_t *>(data)[n]); break;
        case 4: p = a.position_signed ? int64(static_cast<const int32_t *>(data)[n])
                                      : int64(static_cast<const uint32_t *>(data)[n]); break;
        default: p = static_cast<const int64 *>(data)[n];
    }
    const bool negative = a.position_signed && p < 0;
    return {negative ? 0 - static_cast<uint64>(p) : static_cast<uint64>(p), negative};
}

// 2^e, for −126 ≤ e ≤ 127.
__device__ inline float power_of_two(int e) { return __int_as_float((127 + e) << 23); }

// The angle of at most an eighth of a turn that `high` and `low` are, in units of 2^-128 turns: its
// first 32 significant bits, times 2π.
__device__ inline Twofold angle_of(uint64 high, uint64 low) {
    int words = 0;  // of zeros before the first that is not zero
    for (; words < 3 && high >> 32 == 0; ++words) high = high << 32 | low >> 32, low <<= 32;
    const unsigned first = static_cast<unsigned>(high >> 32);
    if (first == 0) return {0.0f, 0.0f};
    const int zeros = __clz(static_cast<int>(first));
    const unsigned bits = __funnelshift_l(static_cast<unsigned>(high), first, zeros);
    constexpr unsigned QUARTER_OF_TAU = 0xc90fdaa2u;  // π/2 · 2^31
    const unsigned product = __umulhi(bits, QUARTER_OF_TAU);
    // it is bits · 2^−(32 + zeros + 32 words) turns, and product / bits is 2π / 2^3, so:
    const float rounded = __uint2float_rn(product);
    const float rest = __int2float_rn(static_cast<int>(product - __float2uint_rn(rounded)));
    const int e = -(29 + zeros + 32 * words);
    const float scale = power_of_two(e < -126 ? -126 : e);  // below that, sine is 0 in float
    return {rounded * scale, rest * scale};
}

// Of an angle of at most π/4, with some 29 bits of each: Taylor's series, whose first terms are kept
// in two parts.
__device__ inline void cosine_and_sine(Twofold angle, Twofold &cosine, Twofold &sine) {
    const float x = angle.high;
    const float square = __fmul_rn(x, x);
    const float square_low = __fmaf_rn(x, x, -square) + 2.0f * x * angle.low;

    float even = -1.0f / 3628800.0f;
    even = __fmaf_rn(even, square, 1.0f / 40320.0f);
    even = __fmaf_rn(even, square, -1.0f / 720.0f);
    even = __fmaf_rn(even, square, 1.0f / 24.0f);
    const float half = 0.5f * square;
    cosine.high = __fadd_rn(1.0f, -half);
    cosine.low = (__fadd_rn(1.0f, -cosine.high) - half) +
                 __fmaf_rn(square * square, even, -0.5f * square_low);

    float odd = 1.0f / 362880.0f;
    odd = __fmaf_rn(odd, square, -1.0f / 5040.0f);
    odd = __fmaf_rn(odd, square, 1.0f / 120.0f);
    odd = __fmaf_rn(odd, square, -1.0f / 6.0f);
    sine.high = x;
    sine.low = __fmaf_rn(x * square, odd, __fmaf_rn(-0.5f * square, angle.low, angle.low));
}

// The product, rounded once.
__device__ inline float times(const Twofold &x, const Twofold &y) {
    const float product = __fmul_rn(x.high, y.high);
    return product + (__fmaf_rn(x.high, y.high, -product) +
                      __fmaf_rn(x.high, y.low, x.low * y.high));
}

// Cosine and sine, times the amplitude, of the angle of `frequency` at `position`.
__device__ inline float2 turn_of(const RotaryArguments &a, const Frequency &frequency,
                                 const Position &position) {
    const uint64 p = position.magnitude;
    const uint64 low = frequency.low * p;
    const uint64 high = frequency.high * p + __umul64hi(frequency.low, p);
    // the nearest quarter of a turn, and what is left to it, of either sign
    const unsigned quarter = static_cast<unsigned>((high + (1ull << 61)) >> 62);
    uint64 rest_high = high - (static_cast<uint64>(quarter) << 62), rest_low = low;
    const bool below = static_cast<int64>(rest_high) < 0;
    if (below) rest_high = ~rest_high + (low == 0), rest_low = 0 - low;

    Twofold cosine, sine;
    cosine_and_sine(angle_of(rest_high, rest_low), cosine, sine);
    const float c = times(cosine, a.amplitude);
    const float s = below ? -times(sine, a.amplitude) : times(sine, a.amplitude);
    const bool odd = quarter & 1, behind = quarter & 2;
    const float x = odd ? -s : c, y = odd ? c : s;
    const bool other_way = position.negative != (a.backwards != 0);
    return {behind ? -x : x, behind != other_way ? -y : y};
}

// --- Rows -----------------------------------------------------------------------------------------

// The place of channel `d` of a row; vectors have channels that follow one another.
__device__ inline int64 channel(const Rows &x, int64 d) { return WIDTH > 1 ? d : d * x.stride[3]; }

template <class V = Vector>
__device__ inline V load(const Rows &x, int64 row, int64 d) {
    return *reinterpret_cast<const V *>(static_cast<const Element *>(x.data) + row + channel(x, d));
}

template <class V>
__device__ inline void store(const V &vector, const Rows &x, int64 row, int64 d) {
    *reinterpret_cast<V *>(static_cast<Element *>(x.data) + row + channel(x, d)) = vector;
}

__device__ inline Element &element(Vector &one, Vector &two, int i) {
    return i < WIDTH ? one.at[i] : two.at[i - WIDTH];
}

// Turns unit `unit` of one row, by the cosines and sines of its token.
__device__ inline void turn(const Rows &x, int64 from, const Rows &out, int64 to, int unit, int pairs,
                            const float *cosines, const float *sines) {
    const int first = INTERLEAVED ? 2 * WIDTH * unit : WIDTH * unit;
    const int second = INTERLEAVED ? first + WIDTH : first + pairs;
    Vector one = load(x, from, first), two = load(x, from, second);
    const Floats c = *reinterpret_cast<const Floats *>(cosines + WIDTH * unit);
    const Floats s = *reinterpret_cast<const Floats *>(sines + WIDTH * unit);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        Element &here = element(one, two, INTERLEAVED ? 2 * i : i);
        Element &there = element(one, two, INTERLEAVED ? 2 * i + 1 : WIDTH + i);
        const float x1 = to_float(here), x2 = to_float(there);
        round_to(x1 * c.at[i] - x2 * s.at[i], &here);
        round_to(x2 * c.at[i] + x1 * s.at[i], &there);
    }
    store(one, out, to, first);
    store(two, out, to, second);
}

// Copies vectors of one row that pass through: two of them, if there are two, since what a thread has
// on its way must hide the latency of memory. They are no numbers here: their bits are kept.
template <class V>
__device__ inline void pass(const RotaryArguments &a, const Rows &x, int64 from, const Rows &out,
                            int64 to, int unit) {
    const int second = unit + static_cast<int>(a.passing + 1) / 2;
    const int64 d = 2 * a.pairs + a.passing_width * unit, e = 2 * a.pairs + a.passing_width * second;
    const V one = load<V>(x, from, d);
    if (second < a.passing) {
        const V two = load<V>(x, from, e);
        store(two, out, to, e);
    }
    store(one, out, to, d);
}

// --- The kernel -----------------------------------------------------------------------------------

struct Token {
    Position position;
    int64 x, out, other, out_other;  // where its first row is in each array
};

__device__ inline int64 token_of(const Rows &x, int64 b, int64 l) {
    return b * x.stride[0] + l * x.stride[1];
}

extern "C" __global__ void __launch_bounds__(THREADS, TOGETHER)
    rotary_turn(const __grid_constant__ RotaryArguments a) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int pairs = static_cast<int>(a.pairs), most = static_cast<int>(a.tokens);
    float *const cosines = reinterpret_cast<float *>(shared);  // [tokens, pairs]
    float *const sines = cosines + most * pairs;
    Token *const token = reinterpret_cast<Token *>(sines + most * pairs);  // [tokens]

    const int64 first = static_cast<int64>(blockIdx.x) * most, left = a.B * a.L - first;
    const int tokens = left < most ? static_cast<int>(left) : most;
    const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;

    for (int t = thread; t < tokens; t += threads) {
        const int64 b = a.B == 1 ? 0 : (first + t) / a.L, l = first + t - b * a.L;
        token[t] = {position_of(a, b, l), token_of(a.x, b, l), token_of(a.out, b, l),
                    token_of(a.other, b, l), token_of(a.out_other, b, l)};
    }
    __syncthreads();
    const int together = threads / pairs;  // tokens whose angles are computed at a time
    if (const int pair = thread % pairs; thread < together * pairs) {
        const Frequency frequency = a.frequency[pair];
        for (int t = thread / pairs; t < tokens; t += together) {
            const float2 turned = turn_of(a, frequency, token[t].position);
            cosines[t * pairs + pair] = turned.x, sines[t * pairs + pair] = turned.y;
        }
    }
    __syncthreads();

    // Row by row of all heads of all tokens: threads of one y share a row, and each has some of its
    // columns, which are units to turn and then pairs of vectors to copy.
    const int heads = static_cast<int>(a.heads), all_heads = heads + static_cast<int>(a.other_heads);
    const int units = pairs / WIDTH, columns = units + static_cast<int>(a.passing + 1) / 2;
    const int rows = static_cast<int>(blockDim.y), more = rows / all_heads;
    int t = static_cast<int>(threadIdx.y) / all_heads;
    int n = static_cast<int>(threadIdx.y) - t * all_heads;
    for (; t < tokens; t += more, n += rows - more * all_heads) {
        if (n >= all_heads) n -= all_heads, ++t;
        if (t >= tokens) break;
        const bool others = n >= heads;
        const int h = others ? n - heads : n;
        const Rows &x = others ? a.other : a.x, &out = others ? a.out_other : a.out;
        const int64 from = (others ? token[t].other : token[t].x) + h * x.stride[2];
        const int64 to = (others ? token[t].out_other : token[t].out) + h * out.stride[2];
        for (int column = threadIdx.x; column < columns; column += blockDim.x) {
            if (column < units) {
                turn(x, from, out, to, column, pairs, cosines + t * pairs, sines + t * pairs);
            } else if (a.passing_width == WIDTH) {
                pass<Vector>(a, x, from, out, to, column - units);
            } else {
                pass<Widest>(a, x, from, out, to, column - units);
            }
        }
    }
}
