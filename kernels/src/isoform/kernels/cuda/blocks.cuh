// Finding one's place, in kernels of any operation: which block, which lane.

#pragma once

#include <cuda/std/cstdint>

using int64 = cuda::std::int64_t;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }

// Blocks are numbered along one axis, the only one that may have more than 65535 of them.
struct Tiles {
    int64 rest;

    // The next coordinate of this block, of those there are `size` of.
    __device__ int64 next(int64 size) {
        const int64 coordinate = rest % size;
        rest /= size;
        return coordinate;
    }
};

__device__ inline int tiles_of(int64 length, int size) {
    return static_cast<int>((length + size - 1) / size);
}

__device__ inline int clamp(int64 x, int low, int high) {
    return x < low ? low : x > high ? high : static_cast<int>(x);
}
