// Products on tensor cores, in kernels of any operation: how a warp's numbers lie, and sums over rows.
//
// A warp multiplies tiles of 16-bit elements with `mma_m16n8k16`, which sums in float. It owns
// 16 · M_TILES rows of each product: queries in most kernels, keys in backward_key. Of an accumulator
// x[m][n][4] a lane holds
//
//     x[m][n][0], x[m][n][1]   row 16 m + lane / 4,       columns 8 n + 2 (lane % 4) and the next
//     x[m][n][2], x[m][n][3]   row 16 m + lane / 4 + 8,   the same columns
//
// which is at the same time, rounded and packed in pairs, the left operand of the next product: the
// weights never leave the registers.
//
// Shared memory holds a tile as rows of HEAD_DIM elements, zeros beyond D, and eight elements more:
// an odd number of 16-byte pieces, so that the eight rows that `ldmatrix` reads at once lie in
// different banks.
//
// Defines: ELEMENT (1 or 2, see primitives.cuh); HEAD_DIM, a multiple of 16 and ≥ D; M_TILES.

#pragma once

#include "blocks.cuh"
#include "primitives.cuh"

constexpr int STEPS = HEAD_DIM / 16;  // k-steps of a product over channels
constexpr int PITCH = HEAD_DIM + 8;   // elements from row to row in shared memory
constexpr int OWN = 16 * M_TILES;     // rows of a warp
constexpr float LOG2_E = 1.44269504f;

// What gradients of logits are kept in units of at first, where they are float16 (rules EVO-7, SEQ-7).
constexpr float FIRST_UNIT = 5.9604645e-8f;  // 2^−24

using Row = Element[PITCH];
using Fragments = unsigned[M_TILES][STEPS][4];  // the left operand of a product over channels
using Result = float[M_TILES][2 * STEPS][4];    // a row of channels for each row of the warp

// The sum over the four lanes that share a row of an accumulator.
__device__ inline float over_row(float x) {
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// Sixteen of the warp's rows and sixteen channels, as the left operand of a product over channels.
__device__ inline void load_fragment(unsigned (&x)[4], const Row *rows, int m, int step) {
    ldmatrix_x4(x, rows[16 * m + lane() % 16] + 16 * step + 8 * (lane() / 16));
}

// The warp's rows as the left operand of products over channels.
__device__ inline void load_fragments(Fragments &x, const Row *rows) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) load_fragment(x[m][step], rows, m, step);
}

// acc[i, d] += Σ_j x[i, j] rows[j, d], with x rounded.
template <int N>
__device__ inline void multiply_over_rows(Result &acc, const float (&x)[M_TILES][N][4],
                                          const Row *rows) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned left[M_TILES][4];
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
            left[m][0] = pack(x[m][n][0], x[m][n][1]);
            left[m][1] = pack(x[m][n][2], x[m][n][3]);
            left[m][2] = pack(x[m][n + 1][0], x[m][n + 1][1]);
            left[m][3] = pack(x[m][n + 1][2], x[m][n + 1][3]);
        }
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4_trans(words, rows[8 * n + lane() % 16] + 16 * step + 8 * (lane() / 16));
            const unsigned first[2] = {words[0], words[1]}, second[2] = {words[2], words[3]};
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
                mma_m16n8k16<Element>(acc[m][2 * step], left[m], first);
                mma_m16n8k16<Element>(acc[m][2 * step + 1], left[m], second);
            }
        }
    }
}
