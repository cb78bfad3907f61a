// Finding one's place: which part of the call a block does, and where its operands lie.

#pragma once

#include "evoformer_arguments.cuh"
#include "primitives.cuh"

// The head of one row of one example: what a block works on.
struct Head {
    int64 b, s, h;
};

// The key/value head that serves query head h.
__device__ inline Head group_of(const EvoformerArguments &a, const Head &at) {
    return {at.b, at.s, at.h / (a.H / a.G)};
}

// The channels of one position, x[b, s, position, h, :].
__device__ inline Element *channels_of(const Operand &x, const Head &at, int64 position) {
    return static_cast<Element *>(x.data) + at.b * x.stride[0] + at.s * x.stride[1] +
           position * x.stride[2] + at.h * x.stride[3];
}

// Where query i stands in what the backward keeps, contiguous [B, S, H, Q].
__device__ inline int64 number_of(const EvoformerArguments &a, const Head &at, int64 i) {
    return ((at.b * a.S + at.s) * a.H + at.h) * a.Q + i;
}

// Whether key j is there, and left by the mask (rule EVO-4).
__device__ inline bool kept(const EvoformerArguments &a, const Head &at, int64 j) {
    if (j >= a.K) return false;
    if (a.mask.data == nullptr) return true;
    const unsigned char *mask = static_cast<const unsigned char *>(a.mask.data);
    return mask[at.b * a.mask.stride[0] + at.s * a.mask.stride[1] + j * a.mask.stride[2]] != 0;
}

// The mask bias of key j, 0 where there is none.
__device__ inline float mask_bias_of(const EvoformerArguments &a, const Head &at, int64 j) {
    const Operand &x = a.mask_bias;
    if (x.data == nullptr) return 0.0f;
    const Element *bias = static_cast<const Element *>(x.data);
    return to_float(bias[at.b * x.stride[0] + at.s * x.stride[1] + j * x.stride[4]]);
}
