// Stands for CUDA's header: the type, and conversions by name, as in cuda_fp16.h.
#pragma once

#include <cstdint>

#include "cuda_emulator.h"

struct __nv_bfloat16 {
    std::uint16_t bits;

    __nv_bfloat16() = default;
    explicit inline __nv_bfloat16(float value);
    explicit inline operator float() const;
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 value;
    value.bits = bits;
    return value;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
    return value.bits;
}

// To nearest, ties to even; NaN becomes the NaN that the device gives.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const std::uint32_t word = __float_as_uint(value);
    if ((word & 0x7fffffffu) > 0x7f800000u) {
        return __ushort_as_bfloat16(0x7fff);
    }
    const std::uint32_t half_ulp = 0x7fffu + (word >> 16 & 1);
    return __ushort_as_bfloat16((word + half_ulp) >> 16);
}

inline float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float(std::uint32_t{value.bits} << 16);
}

inline __nv_bfloat16::__nv_bfloat16(float value) : bits(__float2bfloat16_rn(value).bits) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
    return {__bfloat162float(pair.x), __bfloat162float(pair.y)};
}
inline float __low2float(__nv_bfloat162 pair) { return __bfloat162float(pair.x); }
inline float __high2float(__nv_bfloat162 pair) { return __bfloat162float(pair.y); }
