// Vectors of 16 bytes, in which kernels read and write the rows of a matrix, and their numbers as floats.
//
// Defines: ELEMENT (see primitives.cuh); WIDTH, elements of a vector, so many that every row starts
// on a multiple of its size: 1, 2, 4 or 8, 16 bytes at most.

#pragma once

#include "matrix.cuh"
#include "primitives.cuh"

// Of 16-bit elements as pairs: where ways meet of which one has read them, a compiler would take single
// ones apart at once, and wait for them.
#define ISOFORM_PAIRS (ELEMENT != 0 && WIDTH > 1)

struct alignas(WIDTH * sizeof(Element)) Vector {
#if ISOFORM_PAIRS
    unsigned pairs[WIDTH / 2];
#else
    Element at[WIDTH];
#endif
};

struct Floats {
    float at[WIDTH];
};

__device__ inline Floats widened(const Vector &vector) {
    Floats wide;
#if ISOFORM_PAIRS
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
        const float2 pair = unpack(vector.pairs[i]);
        wide.at[2 * i] = pair.x, wide.at[2 * i + 1] = pair.y;
    }
#else
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) wide.at[i] = to_float(vector.at[i]);
#endif
    return wide;
}

__device__ inline Vector rounded(const Floats &wide) {
    Vector vector;
#if ISOFORM_PAIRS
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) vector.pairs[i] = pack(wide.at[2 * i], wide.at[2 * i + 1]);
#else
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) round_to(wide.at[i], &vector.at[i]);
#endif
    return vector;
}

__device__ inline Vector load(const Matrix &x, int64 row, int64 column) {
    return *reinterpret_cast<const Vector *>(static_cast<const Element *>(x.data) + row * x.stride +
                                             column);
}

__device__ inline void store(const Vector &vector, const Matrix &x, int64 row, int64 column) {
    *reinterpret_cast<Vector *>(static_cast<Element *>(x.data) + row * x.stride + column) = vector;
}
