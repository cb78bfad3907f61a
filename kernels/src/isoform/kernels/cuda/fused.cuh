// What kernels share that pass over activations once: which thread has which vectors, and sums over
// rows for the gradient of a bias.
//
// A block has a *tile* of columns, blockDim.x vectors wide, and a *chunk* of the rows: of blockDim.y
// rows times AT_ONCE, every chunks-th. A thread keeps its columns, so that it reads the bias once and
// sums a bias's gradient in registers. It reads AT_ONCE rows before it computes, which hides the
// latency of memory.
//
// Defines: ELEMENT, WIDTH (see vectors.cuh).

#pragma once

#include "fused_arguments.cuh"
#include "vectors.cuh"

constexpr int THREADS = 256;
constexpr int AT_ONCE = 4;

// The thread's columns of a vector, such as the bias.
__device__ inline Floats of_columns(const void *vector, int64 column) {
    return widened(*reinterpret_cast<const Vector *>(static_cast<const Element *>(vector) + column));
}

// Which elements a thread has.
struct Share {
    int64 chunk;
    int64 column;     // the first of WIDTH
    bool there;       // whether there are such columns
    int64 row;        // the first row
    int64 next, far;  // from there to the next of AT_ONCE rows, and to the next AT_ONCE rows
};

__device__ inline Share share_of(const FusedArguments &a) {
    const unsigned tiles = static_cast<unsigned>(a.tiles), chunk = blockIdx.x / tiles;
    const int64 tile = blockIdx.x - chunk * tiles, wide = blockDim.x * WIDTH;
    const int64 column = tile * wide + threadIdx.x * WIDTH;
    const int64 rows = blockDim.y * AT_ONCE;
    return {chunk, column, column < a.columns, static_cast<int64>(chunk) * rows + threadIdx.y, blockDim.y,
            a.chunks * rows};
}

// What the block's threads have summed of their columns, to its row of `parts`, in one order whatever
// turns threads take. All threads of the block must call it.
__device__ inline void leave_sums(const FusedArguments &a, const Share &mine, const Floats &sums) {
    __shared__ float kept[THREADS * WIDTH];  // [blockDim.y, blockDim.x * WIDTH]
    const int wide = blockDim.x * WIDTH;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
        kept[threadIdx.y * wide + threadIdx.x * WIDTH + i] = sums.at[i];
    }
    __syncthreads();
    const int64 first = mine.column - threadIdx.x * WIDTH;  // of the tile
    const int threads = blockDim.x * blockDim.y;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < wide; i += threads) {
        float sum = 0.0f;
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) sum += kept[y * wide + i];
        if (first + i < a.columns) {
            static_cast<float *>(a.parts)[mine.chunk * a.columns + first + i] = sum;
        }
    }
}
