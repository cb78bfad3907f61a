// CUDA's built-in vector types, as far as kernels here use them.
#pragma once

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct uint3 {
    unsigned x, y, z;
};

#define ISOFORM_VECTORS(scalar, name)                                    \
    struct alignas(2 * sizeof(scalar)) name##2 {                         \
        scalar x, y;                                                     \
    };                                                                   \
    struct alignas(4 * sizeof(scalar)) name##4 {                         \
        scalar x, y, z, w;                                               \
    };                                                                   \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; } \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

ISOFORM_VECTORS(float, float)
ISOFORM_VECTORS(int, int)
ISOFORM_VECTORS(unsigned, uint)
#undef ISOFORM_VECTORS
