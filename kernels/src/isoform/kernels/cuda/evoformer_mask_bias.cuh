// The last step to dmask_bias, of any kernel that leaves its parts.

#pragma once

#include "evoformer_heads.cuh"

// dmask_bias: the parts of all key/value heads, a thread for each key, 256 in a block.
__device__ inline void add_up_mask_bias(const EvoformerArguments &a) {
    Tiles place = {static_cast<int64>(blockIdx.x) * 256 + threadIdx.x};
    if (place.rest >= a.B * a.S * a.K) return;
    const int64 j = place.next(a.K), s = place.next(a.S), b = place.rest;
    float sum = 0.0f;
    for (int64 g = 0; g < a.G; ++g) sum += a.mask_bias_parts[((b * a.S + s) * a.G + g) * a.K + j];
    const Operand &x = a.dmask_bias;
    round_to(sum, static_cast<Element *>(x.data) + b * x.stride[0] + s * x.stride[1] +
                      j * x.stride[4]);
}
