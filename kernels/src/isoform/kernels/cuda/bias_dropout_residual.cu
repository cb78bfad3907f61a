// residual + dropout(x + bias), and its gradients; one pass over memory each.
//
// What is dropped is not stored. It is drawn anew in the backward, by a generator whose n-th number
// is a function of n and the seed (Philox 4x32-10; Salmon et al., SC 2011). The number of an element
// depends on its row and column alone, not on its dtype, on how it lies, or on which thread has it.
// One evaluation gives 128 bits, which are eight draws: of a row, of columns 8n to 8n + 7.
//
// Defines: ELEMENT, WIDTH (see fused.cuh).

#include "fused.cuh"

struct Draws {
    unsigned word[4];  // two draws each, the lower half first
};

__device__ inline Draws draws_of(uint64 seed, int64 row, int64 column) {
    unsigned c0 = static_cast<unsigned>(column / 8), c1 = static_cast<unsigned>(row);
    unsigned c2 = static_cast<unsigned>(static_cast<uint64>(row) >> 32), c3 = 0;
    unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64 first = uint64{0xd2511f53u} * c0, second = uint64{0xcd9e8d57u} * c2;
        c0 = static_cast<unsigned>(second >> 32) ^ c1 ^ k0;
        c2 = static_cast<unsigned>(first >> 32) ^ c3 ^ k1;
        c1 = static_cast<unsigned>(second), c3 = static_cast<unsigned>(first);
        k0 += 0x9e3779b9u, k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// Of which elements of a vector are kept, the factor; 0 of those dropped.
struct Dropout {
    uint64 seed;
    unsigned threshold;
    float scale;

    __device__ inline explicit Dropout(const FusedArguments &a)
        : seed(*static_cast<const uint64 *>(a.seed)),
          threshold(static_cast<unsigned>(a.threshold)),
          scale(threshold < 65536 ? __fdividef(65536.0f, static_cast<float>(65536 - threshold))
                                  : 0.0f) {}

    // x times the factor; what is dropped becomes 0, whatever it was.
    __device__ inline Floats operator()(Floats x, int64 row, int64 column) const {
        const Draws draws = draws_of(seed, row, column);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            const int draw = WIDTH == 8 ? i : static_cast<int>(column % 8) + i, at = draw / 2;
            const unsigned word = at == 0   ? draws.word[0]
                                  : at == 1 ? draws.word[1]
                                  : at == 2 ? draws.word[2]
                                            : draws.word[3];
            const unsigned drawn = draw % 2 ? word >> 16 : word & 0xffffu;
            x.at[i] = drawn < threshold ? 0.0f : scale * x.at[i];
        }
        return x;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    bias_dropout_residual(const __grid_constant__ FusedArguments a) {
    const Share mine = share_of(a);
    if (!mine.there) return;
    const Dropout dropout(a);
    const Floats bias = of_columns(a.bias, mine.column);
    for (int64 first = mine.row; first < a.rows; first += mine.far) {
        Vector x[AT_ONCE], residual[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int64 row = first + n * mine.next;
            if (row >= a.rows) continue;
            x[n] = load(a.x, row, mine.column);
            residual[n] = load(a.residual, row, mine.column);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int64 row = first + n * mine.next;
            if (row >= a.rows) continue;
            Floats sum = widened(x[n]);
            const Floats rest = widened(residual[n]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum.at[i] += bias.at[i];
            sum = dropout(sum, row, mine.column);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum.at[i] += rest.at[i];
            store(rounded(sum), a.out, row, mine.column);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    bias_dropout_residual_backward(const __grid_constant__ FusedArguments a) {
    const Share mine = share_of(a);
    Floats sums = {};
    if (mine.there) {
        const Dropout dropout(a);
        for (int64 first = mine.row; first < a.rows; first += mine.far) {
            Vector dout[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int64 row = first + n * mine.next;
                if (row < a.rows) dout[n] = load(a.dout, row, mine.column);
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int64 row = first + n * mine.next;
                if (row >= a.rows) continue;
                const Floats dx = dropout(widened(dout[n]), row, mine.column);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) sums.at[i] += dx.at[i];
                store(rounded(dx), a.out, row, mine.column);
            }
        }
    }
    leave_sums(a, mine, sums);
}
