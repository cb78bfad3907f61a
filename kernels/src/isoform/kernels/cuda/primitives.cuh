// The element types, and the few scalar functions whose exact form the contract depends on.
//
// ELEMENT chooses the type of the operands and results: 0 float, 1 __half, 2 __nv_bfloat16. All
// arithmetic is in float, whatever it is: a number is widened when it is read, and rounded once when
// it is written (rule EVO-7).

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if ELEMENT == 0
using Element = float;
__device__ inline float to_float(float x) { return x; }
__device__ inline void round_to(float x, float *place) { *place = x; }
#elif ELEMENT == 1
using Element = __half;
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void round_to(float x, __half *place) { *place = __float2half_rn(x); }
#elif ELEMENT == 2
using Element = __nv_bfloat16;
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void round_to(float x, __nv_bfloat16 *place) { *place = __float2bfloat16_rn(x); }
#else
#error "define ELEMENT: 0 float, 1 __half, 2 __nv_bfloat16"
#endif

// NVRTC has no INFINITY; this is its bit pattern.
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

// The larger of two numbers, and NaN if either is: fmaxf would drop the NaN (rule EVO-9).
__device__ inline float maximum(float a, float b) { return a > b || a != a ? a : b; }

// σ(x) = 1 / (1 + e^−x), without overflow and exact to the last digits for x → −∞ too.
__device__ inline float sigmoid(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}
