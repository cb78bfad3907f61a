// Stands for CUDA's header: the type, and conversions by name.
//
// There is no arithmetic in half precision and no silent conversion to float: a kernel computes in
// float32 and says where it rounds, or it does not compile here.
#pragma once

#include <cstdint>

#include "cuda_emulator.h"

struct __half {
    std::uint16_t bits;

    __half() = default;
    explicit inline __half(float value);
    explicit inline operator float() const;
};
using half = __half;

struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) {
    __half value;
    value.bits = bits;
    return value;
}
inline unsigned short __half_as_ushort(__half value) {
    return value.bits;
}

// To nearest, ties to even; NaN becomes the NaN that the device gives.
inline __half __float2half_rn(float value) {
    const std::uint32_t word = __float_as_uint(value);
    const std::uint32_t sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return __ushort_as_half(0x7fff);
    }
    if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
        return __ushort_as_half(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) {
        // Below 2^-14 halves are multiples of 2^-24, as are floats from 1/2 to 1: the adder rounds.
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return __ushort_as_half(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    const std::uint32_t half_ulp = 0xfffu + (magnitude >> 13 & 1);
    return __ushort_as_half(sign | (magnitude - 0x38000000u + half_ulp) >> 13);
}

inline float __half2float(__half value) {
    const std::uint32_t sign = (value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {
        return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
    }
    if (magnitude < 0x0400u) {
        return __uint_as_float(sign | __float_as_uint(magnitude * 0x1p-24f));
    }
    return __uint_as_float(sign | (magnitude << 13) + 0x38000000u);
}

inline __half::__half(float value) : bits(__float2half_rn(value).bits) {}
inline __half::operator float() const { return __half2float(*this); }

inline __half __float2half(float value) { return __float2half_rn(value); }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
