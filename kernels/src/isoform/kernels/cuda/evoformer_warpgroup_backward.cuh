// What the backward's kernels for Hopper know of a query, besides q and ō: `a.delta` has two floats of
// each, which evoformer_warpgroup_backward_queries.cu writes before any of them starts.

#pragma once

#include "evoformer_heads.cuh"
#include "evoformer_tensor.cuh"

// shift = top log₂ e + log₂ Σ_j e^(s_ij − top): a weight is 2^(s log₂ e − shift). Of one without a key,
// shift is ∞ and minus_delta is 0, and neither its q nor its ō is to be looked at.
struct alignas(8) Told {
    float shift, minus_delta;

    __device__ bool dead() const { return shift == infinity(); }

    // Whether its logits are so large that rounding their product with log₂ e is seen in weights, or
    // something is not finite: δ where ō is not, the sum of weights where q is not. Not if it is dead.
    __device__ bool careful() const {
        return !dead() && !(fabsf(shift) < HUGE_LOGIT * LOG2_E && isfinite(minus_delta));
    }
};

__device__ inline Told *told_of(const EvoformerArguments &a, int64 number) {
    return reinterpret_cast<Told *>(a.delta) + number;
}

// The weight of a logit s of query `number`, where that takes care: the difference first.
__device__ inline float weight_carefully(const EvoformerArguments &a, int64 number, float s) {
    const KeptSoftmax softmax = kept_softmax(a, number);
    const Query query = finished(softmax.top, softmax.total(), 0.0f);
    return exponential<true>(s, query.top, query.shift) * query.inverse;
}
