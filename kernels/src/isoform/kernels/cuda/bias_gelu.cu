// GeLU of x + bias, and its gradients; one pass over memory each.
//
// With u = x + bias, GeLU is u Φ(u). Two forms of Φ: the normal distribution's own, by the error
// function, and σ(2 √(2/π) (u + 0.044715 u³)), which the form "by the tangent" is: (1 + tanh v) / 2 is
// σ(2v). Memory leaves a thread time for some fifteen instructions an element, so an exponential and
// a reciprocal are approximate, to two units in float's last place; both forms need one of each.
//
// Defines: ELEMENT, WIDTH (see fused.cuh); TANH, 1 for the second form.

#include "fused.cuh"

constexpr float LOG2_E = 1.4426950408889634f;

// Φ and its derivative.
struct Normal {
    float below, density;
};

#if TANH
constexpr float ROOT = 0.7978845608028654f, CUBIC = 0.044715f;  // √(2/π)

__device__ inline float below(float u) {
    constexpr float LINEAR = -2.0f * LOG2_E * ROOT;  // so that 2^power is e^{−2v}
    const float power = u * __fmaf_rn(LINEAR * CUBIC * u, u, LINEAR);
    return __fdividef(1.0f, 1.0f + exp2_approximate(power));
}

__device__ inline Normal normal(float u) {
    const float s = below(u);
    const float slope = __fmaf_rn(6.0f * ROOT * CUBIC * u, u, 2.0f * ROOT);
    return {s, s * (1.0f - s) * slope};
}
#else
// erfc(z) e^{z²} as a polynomial in t = 1 / (1 + z/2), fitted for 0 ≤ z ≤ 12, where it errs by 5·10⁻⁸
// of itself; so that below 0 as well Φ is right to its last digits, where 1 + erf would leave none.
__device__ inline Normal normal(float u) {
    constexpr float ROOT_OF_HALF = 0.7071067811865476f, TOP = 0.3989422804014327f;  // 1/√(2π)
    const float t = __fdividef(1.0f, __fmaf_rn(0.5f * ROOT_OF_HALF, fabsf(u), 1.0f));
    float sum = -0.05936412140727043f;
    sum = __fmaf_rn(sum, t, 0.2860153019428253f);
    sum = __fmaf_rn(sum, t, -0.49018222093582153f);
    sum = __fmaf_rn(sum, t, 0.28147807717323303f);
    sum = __fmaf_rn(sum, t, -0.02897382527589798f);
    sum = __fmaf_rn(sum, t, 0.20367920398712158f);
    sum = __fmaf_rn(sum, t, 0.24285344779491425f);
    sum = __fmaf_rn(sum, t, 0.2824096083641052f);
    sum = __fmaf_rn(sum, t, 0.28208446502685547f);
    const float e = exp2_approximate(-0.5f * LOG2_E * u * u);  // e^{−u²/2}
    const float tail = 0.5f * e * sum * t;
    return {u < 0.0f ? tail : 1.0f - tail, TOP * e};
}

__device__ inline float below(float u) { return normal(u).below; }
#endif

// Beyond this Φ is 0 or 1 in float, and its derivative 0; infinity times that would be no number.
constexpr float FAR = 32.0f;

__device__ inline float gelu(float u) { return u * below(u); }

// d GeLU / du = Φ(u) + u Φ'(u).
__device__ inline float slope(float u) {
    const float near = u > FAR ? FAR : u < -FAR ? -FAR : u;  // and NaN stays
    const Normal phi = normal(near);
    return __fmaf_rn(near, phi.density, phi.below);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    bias_gelu(const __grid_constant__ FusedArguments a) {
    const Share mine = share_of(a);
    if (!mine.there) return;
    const Floats bias = of_columns(a.bias, mine.column);
    for (int64 first = mine.row; first < a.rows; first += mine.far) {
        Vector x[AT_ONCE];
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int64 row = first + n * mine.next;
            if (row < a.rows) x[n] = load(a.x, row, mine.column);
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; ++n) {
            const int64 row = first + n * mine.next;
            if (row >= a.rows) continue;
            Floats u = widened(x[n]);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) u.at[i] = gelu(u.at[i] + bias.at[i]);
            store(rounded(u), a.out, row, mine.column);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    bias_gelu_backward(const __grid_constant__ FusedArguments a) {
    const Share mine = share_of(a);
    Floats sums = {};
    if (mine.there) {
        const Floats bias = of_columns(a.bias, mine.column);
        for (int64 first = mine.row; first < a.rows; first += mine.far) {
            Vector x[AT_ONCE], dout[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int64 row = first + n * mine.next;
                if (row >= a.rows) continue;
                x[n] = load(a.x, row, mine.column);
                dout[n] = load(a.dout, row, mine.column);
            }
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
                const int64 row = first + n * mine.next;
                if (row >= a.rows) continue;
                const Floats u = widened(x[n]);
                Floats dx = widened(dout[n]);
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) {
                    dx.at[i] *= slope(u.at[i] + bias.at[i]);
                    sums.at[i] += dx.at[i];
                }
                store(rounded(dx), a.out, row, mine.column);
            }
        }
    }
    leave_sums(a, mine, sums);
}
