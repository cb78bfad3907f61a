// CUDA C++ as a C++17 compiler takes it: included before a kernel's source, which stays as it is.
//
// Every function here is one that CUDA has, under its name and with its meaning. What is missing is
// missing on purpose: a kernel that uses it does not compile here, so nothing is emulated by guess.
#pragma once

#define ISOFORM_EMULATED 1  // for primitives.cuh alone, whose PTX this machine cannot run

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"

// `__global__` expands to what nothing else does: by it the builder finds a program's kernels.
#define __global__ __attribute__((used, visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __constant__ static
// In a function it implies `static`; after `extern` it does not, as `extern __shared__` needs.
#define __shared__ thread_local

#define threadIdx (::isoform::emulate::current->index)
#define blockIdx (::isoform::emulate::block.index)
#define blockDim (::isoform::emulate::block.block_size)
#define gridDim (::isoform::emulate::block.grid_size)
#define warpSize 32

// Callers' file and line, for messages: the defaults of a function are evaluated where it is called.
#define ISOFORM_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define ISOFORM_SITE \
    ::isoform::emulate::Site { __func__, file, line }

// Barriers of the block

inline void __syncthreads(ISOFORM_HERE) {
    isoform::emulate::barrier(ISOFORM_SITE, 0);
}
inline int __syncthreads_count(int predicate, ISOFORM_HERE) {
    return isoform::emulate::barrier(ISOFORM_SITE, predicate);
}
inline int __syncthreads_or(int predicate, ISOFORM_HERE) {
    return isoform::emulate::barrier(ISOFORM_SITE, predicate) != 0;
}
inline int __syncthreads_and(int predicate, ISOFORM_HERE) {
    return isoform::emulate::barrier(ISOFORM_SITE, !predicate) == 0;
}

// Operations of a warp

inline void __syncwarp(unsigned mask = 0xffffffffu, ISOFORM_HERE) {
    isoform::emulate::warp_operation<char>(ISOFORM_SITE, mask, char{},
                                           [](unsigned, const char*, char*) {});
}

namespace isoform::emulate {

template <class T>
struct Offer {
    T value;
    int source;
};

// Every lane gets the value of the lane that it names.
template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source) {
    return warp_operation<T>(
        site, mask, Offer<T>{value, source},
        [](unsigned taking_part, const Offer<T>* offers, T* results) {
            for (unsigned lane = 0; lane < WARP; ++lane) {
                if ((taking_part >> lane & 1) == 0) {
                    continue;
                }
                require_lane(taking_part, lane, offers[lane].source);
                results[lane] = offers[offers[lane].source].value;
            }
        });
}

inline unsigned ballot(const Site& site, unsigned mask, int predicate) {
    return warp_operation<unsigned>(
        site, mask, predicate, [](unsigned taking_part, const int* predicates, unsigned* results) {
            unsigned votes = 0;
            for (unsigned lane = 0; lane < WARP; ++lane) {
                votes |= ((taking_part >> lane & 1) && predicates[lane] ? 1u : 0u) << lane;
            }
            for (unsigned lane = 0; lane < WARP; ++lane) {
                results[lane] = votes;
            }
        });
}

// The first lane of the segment of `width` lanes that the current thread is in.
inline int segment(int width) {
    return static_cast<int>(current->lane) / width * width;
}

}  // namespace isoform::emulate

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, ISOFORM_HERE) {
    using namespace isoform::emulate;
    return shuffle(ISOFORM_SITE, mask, value, segment(width) + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, ISOFORM_HERE) {
    using namespace isoform::emulate;
    const int lane = current->lane, source = lane ^ distance;
    return shuffle(ISOFORM_SITE, mask, value, source < segment(width) + width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, ISOFORM_HERE) {
    using namespace isoform::emulate;
    const int lane = current->lane, source = lane + static_cast<int>(distance);
    return shuffle(ISOFORM_SITE, mask, value, source < segment(width) + width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, ISOFORM_HERE) {
    using namespace isoform::emulate;
    const int lane = current->lane, source = lane - static_cast<int>(distance);
    return shuffle(ISOFORM_SITE, mask, value, source >= segment(width) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ISOFORM_HERE) {
    return isoform::emulate::ballot(ISOFORM_SITE, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, ISOFORM_HERE) {
    return isoform::emulate::ballot(ISOFORM_SITE, mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ISOFORM_HERE) {
    return isoform::emulate::ballot(ISOFORM_SITE, mask, !predicate) == 0;
}

// Memory: threads take turns, so a fence has nothing to order, and any update is atomic.

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <class T>
T atomicMax(T* address, T value) {
    const T old = *address;
    *address = old < value ? value : old;
    return old;
}
template <class T>
T atomicExch(T* address, T value) {
    const T old = *address;
    *address = value;
    return old;
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
    const T old = *address;
    *address = old == compare ? value : old;
    return old;
}

// Arithmetic. The device's fast forms may err by more than these, which are the C library's.

using std::isfinite;
using std::isinf;
using std::isnan;

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((std::uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(std::uint64_t{a} * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }

namespace isoform::emulate {
template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace isoform::emulate

// What does not fit becomes the nearest that does, and NaN 0.
inline unsigned __float2uint_rn(float x) {
    if (!(x > 0)) {
        return 0;
    }
    return x >= 0x1p32f ? UINT_MAX : static_cast<unsigned>(std::nearbyint(x));
}

inline float __int_as_float(int x) { return isoform::emulate::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return isoform::emulate::same_bits<float>(x); }
inline int __float_as_int(float x) { return isoform::emulate::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return isoform::emulate::same_bits<unsigned>(x); }
