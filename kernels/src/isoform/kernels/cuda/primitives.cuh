// The element types, the few scalar functions whose exact form the contract depends on, and every
// instruction that C++ has no name for: all inline PTX of the project is in this file.
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

// --- Two 16-bit elements in one register ----------------------------------------------------------

#if ELEMENT == 1
constexpr unsigned MINUS_INFINITIES = 0xfc00fc00u;
__device__ inline float2 unpack(unsigned pair) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}
__device__ inline unsigned pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned *>(&pair);
}
#elif ELEMENT == 2
constexpr unsigned MINUS_INFINITIES = 0xff80ff80u;
__device__ inline float2 unpack(unsigned pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ inline unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned *>(&pair);
}
#endif

#if ELEMENT != 0
// Σ x_e y_e of eight elements each.
__device__ inline float dot(const uint4 &x, const uint4 &y) {
    float sum = 0.0f;
    const auto add = [&](unsigned x_pair, unsigned y_pair) {
        const float2 a = unpack(x_pair), b = unpack(y_pair);
        sum += a.x * b.x + a.y * b.y;
    };
    add(x.x, y.x), add(x.y, y.y), add(x.z, y.z), add(x.w, y.w);
    return sum;
}
#endif

// --- Instructions: tensor cores and asynchronous copies, sm_80 and newer --------------------------
//
// Fragments lie in a warp's registers as the PTX manual draws them. With group = lane / 4 and
// pair = 2 (lane % 4), a lane holds of a 16 × 8 accumulator the rows group and group + 8, columns
// pair and pair + 1.

#ifdef ISOFORM_EMULATED
#include "emulated_primitives.h"
__device__ inline float exp2_approximate(float x) { return exp2f(x); }
__device__ inline float reciprocal_approximate(float x) { return 1.0f / x; }
__device__ inline void rarely() {}
__device__ inline int unknown_zero() { return 0; }
__device__ inline float anew(float x) { return x; }
using SharedAddress = const unsigned char *;
__device__ inline SharedAddress shared_address(const void *place) {
    return static_cast<SharedAddress>(place);
}
__device__ inline SharedAddress here(SharedAddress place) { return place; }
#else
using SharedAddress = unsigned;
__device__ inline SharedAddress shared_address(const void *place) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(place));
}

// The same, but the compiler is not to know: what is a known distance away is reached from here, and
// does not take a register of its own.
__device__ inline SharedAddress here(SharedAddress place) {
    asm volatile("" : "+r"(place));
    return place;
}

// result = start + A B for a 16 × 16 tile A and a 16 × 8 tile B; `start` keeps its registers.
template <class T>
__device__ inline void mma_m16n8k16(float (&result)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2], const float (&start)[4]) {
#define ISOFORM_MMA(TYPE)                                                                \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                           \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                 \
        : "=f"(result[0]), "=f"(result[1]), "=f"(result[2]), "=f"(result[3])             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),              \
          "f"(start[0]), "f"(start[1]), "f"(start[2]), "f"(start[3]))
#if ELEMENT == 1
    ISOFORM_MMA("f16");
#elif ELEMENT == 2
    ISOFORM_MMA("bf16");
#endif
#undef ISOFORM_MMA
}

// accumulator += A B.
template <class T>
__device__ inline void mma_m16n8k16(float (&accumulator)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2]) {
    mma_m16n8k16<T>(accumulator, a, b, accumulator);
}

// Four 8 × 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ inline void ldmatrix_x4(unsigned (&matrices)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row));
}

__device__ inline void ldmatrix_x4(unsigned (&matrices)[4], const void *row) {
    ldmatrix_x4(matrices, shared_address(row));
}

__device__ inline void ldmatrix_x4_trans(unsigned (&matrices)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row));
}

__device__ inline void ldmatrix_x4_trans(unsigned (&matrices)[4], const void *row) {
    ldmatrix_x4_trans(matrices, shared_address(row));
}

#if __CUDA_ARCH__ >= 900
// Writes what ldmatrix_x4 reads.
__device__ inline void stmatrix_x4(void *row, const unsigned (&matrices)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                     shared_address(row)),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}
#endif

// Copies 16 bytes to shared memory, or zeros where they are not wanted, and then reads nothing.
__device__ inline void cp_async_16(void *shared, const void *global, bool wanted) {
    asm volatile("{ .reg .pred none; setp.eq.s32 none, %2, 0;"
                 "  cp.async.cg.shared.global [%0], [%1], 16, none; }" ::"r"(shared_address(shared)),
                 "l"(global), "r"(static_cast<int>(wanted)));
}

__device__ inline void cp_async_16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global));
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until `pending` groups of this thread's copies at most are under way.
template <int pending>
__device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// A signal in shared memory, for those who wait until so many have arrived as it expects, again and
// again: each time its phase ends, which was 0, then 1, then 0. To wait for the end of phase 1 of one that
// was never waited for is to go on.
struct alignas(8) Signal {
    unsigned long long state;
};

__device__ inline void expect(Signal *signal, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(arrivals)
                 : "memory");
}

// What the thread has written before is there for who has waited.
__device__ inline void arrive(Signal *signal) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(
                     shared_address(signal))
                 : "memory");
}

__device__ inline void wait_for(Signal *signal, unsigned phase) {
#if __CUDA_ARCH__ >= 900
#define ISOFORM_WAIT "mbarrier.try_wait.parity.shared.b64 over, [%0], %1, 10000000"  // which sleeps, for ns
#else
#define ISOFORM_WAIT "mbarrier.test_wait.parity.shared.b64 over, [%0], %1"
#endif
    asm volatile("{ .reg .pred over; again: " ISOFORM_WAIT "; @!over bra again; }" ::"r"(
                     shared_address(signal)),
                 "r"(phase)
                 : "memory");
#undef ISOFORM_WAIT
}

// How an array lies of which tiles are fetched, at most five axes: what the driver says of it, or the
// emulator.
struct alignas(64) TileMap {
    unsigned char bytes[128];
};

#if __CUDA_ARCH__ >= 900
// Starts to fetch the tile that begins at these places of the axes, that in which it is adjacent first, to
// shared memory. The signal has to expect its bytes.
__device__ inline void fetch_tile(void *shared, const TileMap &map, int at0, int at1, int at2, int at3,
                                  int at4, Signal *signal) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared_address(shared)),
                 "l"(&map), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "r"(at4),
                 "r"(shared_address(signal))
                 : "memory");
}

// Arrives, and has the signal wait for so many bytes that are fetched.
__device__ inline void arrive_expecting(Signal *signal, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(signal)),
                 "r"(bytes)
                 : "memory");
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ISOFORM_WARPGROUPS 1

// Products of a warpgroup: four warps, of which each has sixteen rows of the left operand and of the
// result, in registers as for mma_m16n8k16. They stand between `warpgroup_begin` and `warpgroup_commit`,
// and are under way until `warpgroup_wait`: till then neither operands nor results may be touched.
//
// A tile in shared memory is named by a descriptor. It lies in columns of pieces of 16 bytes, eight
// elements of the axis that is adjacent in memory: from piece to piece of a row of the tile it is `across`
// bytes, and 16 from row to row.
struct TileName {
    unsigned low, high;

    // The tile so many bytes further, or so many times 16.
    __device__ TileName at(unsigned bytes) const { return {low + bytes / 16, high}; }
    __device__ TileName after(unsigned pieces) const { return {low + pieces, high}; }

    __device__ unsigned long long whole() const {
        return static_cast<unsigned long long>(high) << 32 | low;
    }
};

__device__ inline TileName name_of(SharedAddress first, unsigned low, unsigned high) {
    return {(low / 16 << 16) + (first & 0x3ffffu) / 16, high / 16};
}

// Of a left operand, or of a right one whose rows are the result's columns.
__device__ inline TileName by_rows(SharedAddress first, unsigned across) {
    return name_of(first, across, 128);
}

// Of a right operand whose rows are summed over: from eight of them to the next eight it is `down` bytes.
__device__ inline TileName by_columns(SharedAddress first, unsigned across, unsigned down) {
    return name_of(first, down, across);
}

// The same, whatever is summed over, of a tile of which rows of 32 bytes are adjacent in memory, with their two
// pieces exchanged in every second four of them: further columns follow `across` bytes further.
__device__ inline TileName swizzled(SharedAddress first, unsigned across = 0) {
    const TileName plain = name_of(first, across, 256);
    return {plain.low, plain.high | 3u << 30};
}

__device__ inline void warpgroup_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void warpgroup_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until `pending` of those that were committed at most are under way.
template <int pending = 0>
__device__ inline void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// To stand after the wait for products that write x: what reads x is computed after it. Between numbers in
// registers and waiting the compiler knows no other order.
template <int N>
__device__ inline void warpgroup_results(float (&x)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n)
        asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
}

// What is in shared memory, as far as the thread knows, is there for the products that it begins next.
__device__ inline void shared_for_warpgroups() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#if ELEMENT == 1
#define ISOFORM_TYPES "f32.f16.f16"
#else
#define ISOFORM_TYPES "f32.bf16.bf16"
#endif
#define ISOFORM_FOUR(x) "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3])

// For 64 rows of A, and accumulators x of 8 TILES columns, which are the operands X of the instruction:
//
// x = A Bᵀ, or x + A Bᵀ, for sixteen columns of both: A in registers, or in shared memory;
// x += A B for sixteen columns of A, in registers or in shared memory, and sixteen rows of B.
#define ISOFORM_MULTIPLY(TILES, WIDTH, X, OPERANDS, N0, N1, N2, N3, N4, N5)                            \
    __device__ inline void warpgroup_multiply_rows(float (&x)[TILES][4], TileName a, TileName b,       \
                                                   bool add) {                                         \
        asm volatile("{ .reg .pred add; setp.ne.s32 add, %" #N2 ", 0;"                                 \
                     "  wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16." ISOFORM_TYPES                 \
                     " {" X "}, %" #N0 ", %" #N1 ", add, 1, 1, 0, 0; }"                                \
                     : OPERANDS                                                                        \
                     : "l"(a.whole()), "l"(b.whole()), "r"(static_cast<int>(add)));                    \
    }                                                                                                  \
    __device__ inline void warpgroup_multiply_rows(float (&x)[TILES][4], const unsigned (&a)[4],       \
                                                   TileName b, bool add) {                             \
        asm volatile("{ .reg .pred add; setp.ne.s32 add, %" #N5 ", 0;"                                 \
                     "  wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16." ISOFORM_TYPES                 \
                     " {" X "}, {%" #N0 ",%" #N1 ",%" #N2 ",%" #N3 "}, %" #N4 ", add, 1, 1, 0; }"      \
                     : OPERANDS                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.whole()),                     \
                       "r"(static_cast<int>(add)));                                                    \
    }                                                                                                  \
    __device__ inline void warpgroup_multiply_columns(float (&x)[TILES][4], const unsigned (&a)[4],    \
                                                      TileName b) {                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16." ISOFORM_TYPES                   \
                     " {" X "}, {%" #N0 ",%" #N1 ",%" #N2 ",%" #N3 "}, %" #N4 ", 1, 1, 1, 1;"          \
                     : OPERANDS                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.whole()));                    \
    }                                                                                                  \
    __device__ inline void warpgroup_multiply_columns(float (&x)[TILES][4], TileName a, TileName b) {  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16." ISOFORM_TYPES                   \
                     " {" X "}, %" #N0 ", %" #N1 ", 1, 1, 1, 0, 1;"                                    \
                     : OPERANDS                                                                        \
                     : "l"(a.whole()), "l"(b.whole()));                                                \
    }
#define ISOFORM_X2 "%0,%1,%2,%3,%4,%5,%6,%7"
#define ISOFORM_X4 ISOFORM_X2 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define ISOFORM_X6 ISOFORM_X4 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define ISOFORM_X8 ISOFORM_X6 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define ISOFORM_2 ISOFORM_FOUR(x[0]), ISOFORM_FOUR(x[1])
#define ISOFORM_4 ISOFORM_2, ISOFORM_FOUR(x[2]), ISOFORM_FOUR(x[3])
#define ISOFORM_6 ISOFORM_4, ISOFORM_FOUR(x[4]), ISOFORM_FOUR(x[5])
#define ISOFORM_8 ISOFORM_6, ISOFORM_FOUR(x[6]), ISOFORM_FOUR(x[7])
ISOFORM_MULTIPLY(2, 16, ISOFORM_X2, ISOFORM_2, 8, 9, 10, 11, 12, 13)
ISOFORM_MULTIPLY(4, 32, ISOFORM_X4, ISOFORM_4, 16, 17, 18, 19, 20, 21)
ISOFORM_MULTIPLY(6, 48, ISOFORM_X6, ISOFORM_6, 24, 25, 26, 27, 28, 29)
ISOFORM_MULTIPLY(8, 64, ISOFORM_X8, ISOFORM_8, 32, 33, 34, 35, 36, 37)
#undef ISOFORM_MULTIPLY
#undef ISOFORM_X2
#undef ISOFORM_X4
#undef ISOFORM_X6
#undef ISOFORM_X8
#undef ISOFORM_2
#undef ISOFORM_4
#undef ISOFORM_6
#undef ISOFORM_8
#undef ISOFORM_FOUR
#undef ISOFORM_TYPES

// All four warps of a warpgroup give registers to others, or wait until they get some.
template <int registers>
__device__ inline void take_fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void take_more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
#endif

// Says that what stands beside it is rare: the compiler is to branch around it, not to compute it
// always and select.
__device__ inline void rarely() { asm volatile(""); }

// 0, but the compiler is not to know: an address that it is added to is computed where it stands, and not
// ahead, with others like it, to take a register each.
__device__ inline int unknown_zero() {
    int zero = 0;
    asm volatile("" : "+r"(zero));
    return zero;
}

// The same number, but the compiler is not to know: it is kept, and not computed again where it is needed.
__device__ inline float anew(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

// 1 / x to one unit in the last place; of a subnormal x it is ±inf.
__device__ inline float reciprocal_approximate(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 2^x to two units in the last place; subnormal results are 0.
__device__ inline float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#endif

// What a GPU without warpgroups has no need of, nor an emulated one.
#ifndef ISOFORM_WARPGROUPS
__device__ inline void warpgroup_begin() {}
__device__ inline void warpgroup_commit() {}
template <int pending = 0>
__device__ inline void warpgroup_wait() {}
template <int N>
__device__ inline void warpgroup_results(float (&)[N][4]) {}
__device__ inline void shared_for_warpgroups() {}
template <int registers>
__device__ inline void take_fewer_registers() {}
template <int registers>
__device__ inline void take_more_registers() {}
#endif
