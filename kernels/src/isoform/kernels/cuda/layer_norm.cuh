// What the kernels of LayerNorm share: which channels of which row a thread has, and sums over a row.
//
// A row's threads hold it in registers. ACROSS threads have a row, whole warps: each every ACROSS-th
// vector. A block has blockDim.y rows if a warp has one, so that none waits for another at a barrier, and
// else one. It goes through a *chunk* of the rows, of blockDim.y every chunks-th, and reads the next while
// it computes. Weight and bias come from the cache for every row: registers are dearer.
//
// Defines: ELEMENT, WIDTH (see vectors.cuh); ACROSS; VECTORS, how many a thread has.

#pragma once

#include "blocks.cuh"
#include "fused_arguments.cuh"
#include "vectors.cuh"

constexpr int ROWS = ACROSS > 32 ? 1 : 8;  // of a block
constexpr int WARPS = ACROSS / 32;         // of a row
constexpr int THREADS = ACROSS * ROWS;     // of a block

struct alignas(8) Pair {
    float first, second;
};

// Where a thread is, and which of its vectors there are.
struct Place {
    int column;  // the first; the next is ACROSS vectors on
    int columns;
    int64 row, far;  // the first row, and from there to the next

    __device__ bool has(int n) const { return at(n) < columns; }
    __device__ int at(int n) const { return column + n * ACROSS * WIDTH; }
};

__device__ inline Place place_of(const FusedArguments &a) {
    return {static_cast<int>(threadIdx.x) * WIDTH, static_cast<int>(a.columns),
            static_cast<int64>(blockIdx.x) * ROWS + (ROWS > 1 ? threadIdx.y : 0), a.chunks * ROWS};
}

struct Held {
    Vector at[VECTORS];
};

// A row of a matrix, or a vector: zeros where there is none.
__device__ inline Held held(const Matrix &x, int64 row, const Place &place) {
    Held found;
#pragma unroll
    for (int n = 0; n < VECTORS; ++n) {
        found.at[n] = place.has(n) ? load(x, row, place.at(n)) : rounded(Floats{});
    }
    return found;
}

// Sums over a row, in one order whatever turns threads take; all get the same bits. All threads of a
// row must call it. Shared memory may be used again after the next call with another.
__device__ inline Pair over_row(Pair mine, Pair (&kept)[WARPS]) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        mine.first += __shfl_xor_sync(ALL_LANES, mine.first, distance);
        mine.second += __shfl_xor_sync(ALL_LANES, mine.second, distance);
    }
    if (WARPS == 1) return mine;
    if (lane() == 0) kept[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = lane() < WARPS ? kept[lane()] : Pair{0.0f, 0.0f};
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        if (distance >= WARPS) continue;
        mine.first += __shfl_xor_sync(ALL_LANES, mine.first, distance);
        mine.second += __shfl_xor_sync(ALL_LANES, mine.second, distance);
    }
    return {__shfl_sync(ALL_LANES, mine.first, 0), __shfl_sync(ALL_LANES, mine.second, 0)};
}
