// Finding one's place, in kernels of any operation: which block, which lane.

#pragma once

#include <cuda/std/cstdint>

using int64 = cuda::std::int64_t;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

// Coordinates of a place among all, of which the first axes change fastest.
template <class Number>
struct Numbered {
    Number rest;

    // The next coordinate, of those there are `size` of.
    __device__ int64 next(int64 size) {
        const Number sizes = static_cast<Number>(size), coordinate = rest % sizes;
        rest /= sizes;
        return coordinate;
    }
};

using Tiles = Numbered<int64>;

// Blocks are numbered along one axis, the only one that may have more than 65535 of them: up to 2^31 − 1,
// so that 32 bits do for each of their coordinates. To divide 64 bits takes some hundred instructions.
using Blocks = Numbered<unsigned>;

__device__ inline int tiles_of(int64 length, int size) {
    return static_cast<int>((length + size - 1) / size);
}

__device__ inline int clamp(int64 x, int low, int high) {
    return x < low ? low : x > high ? high : static_cast<int>(x);
}
