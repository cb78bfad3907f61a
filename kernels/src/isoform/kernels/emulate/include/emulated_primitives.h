// The tensor-core and copy instructions of primitives.cuh, whose PTX this machine cannot run.
//
// Fragments lie in the lanes' registers as the PTX manual draws them ("Matrix fragments for
// mma.m16n8k16", "ldmatrix"): with group = lane / 4 and pair = 2 * (lane % 4), a register holds the
// elements of row `group` (or group + 8) in columns `pair` and `pair + 1` (or 8 more).
#pragma once

#include "cuda_bf16.h"
#include "cuda_emulator.h"
#include "cuda_fp16.h"

namespace isoform::emulate {

template <class Element>
float element(unsigned word, unsigned which) {
    const std::uint16_t bits = word >> 16 * which & 0xffffu;
    return static_cast<float>(same_bits<Element>(bits));
}

struct Fragments {
    float accumulator[4];
    unsigned a[4], b[2];
};

struct Accumulator {
    float values[4];
};

struct Words {
    unsigned values[4];
};

// The lane and register of A[row][column], B[row][column] and of the accumulator's.
template <class Element>
float element_of_a(const Fragments* lanes, unsigned row, unsigned column) {
    const unsigned lane = row % 8 * 4 + column % 8 / 2;
    return element<Element>(lanes[lane].a[column / 8 * 2 + row / 8], column % 2);
}

template <class Element>
float element_of_b(const Fragments* lanes, unsigned row, unsigned column) {
    const unsigned lane = column * 4 + row % 8 / 2;
    return element<Element>(lanes[lane].b[row / 8], row % 2);
}

template <class Element>
void multiply(unsigned, const Fragments* lanes, Accumulator* results) {
    float a[16][16], b[16][8];
    for (unsigned i = 0; i < 16; ++i) {
        for (unsigned j = 0; j < 16; ++j) {
            a[i][j] = element_of_a<Element>(lanes, i, j);
        }
        for (unsigned j = 0; j < 8; ++j) {
            b[i][j] = element_of_b<Element>(lanes, i, j);
        }
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = lanes[lane].accumulator[i];
            for (unsigned k = 0; k < 16; ++k) {
                sum += a[row][k] * b[k][column];
            }
            results[lane].values[i] = sum;
        }
    }
}

// Four 8×8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
template <bool transposed>
Words load_matrices(const Site& site, const void* row) {
    return warp_operation<Words>(
        site, 0xffffffffu, static_cast<const std::uint16_t*>(row),
        [](unsigned, const std::uint16_t* const* rows, Words* results) {
            for (unsigned lane = 0; lane < WARP; ++lane) {
                const unsigned group = lane / 4, pair = lane % 4 * 2;
                for (unsigned matrix = 0; matrix < 4; ++matrix) {
                    const std::uint16_t* const* matrix_rows = rows + 8 * matrix;
                    const unsigned low =
                        transposed ? matrix_rows[pair][group] : matrix_rows[group][pair];
                    const unsigned high =
                        transposed ? matrix_rows[pair + 1][group] : matrix_rows[group][pair + 1];
                    results[lane].values[matrix] = low | high << 16;
                }
            }
        });
}

}  // namespace isoform::emulate

// result = start + A B for a 16×16 tile A and a 16×8 tile B.
template <class Element>
void mma_m16n8k16(float (&result)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  const float (&start)[4], ISOFORM_HERE) {
    using namespace isoform::emulate;
    const Fragments fragments{
        {start[0], start[1], start[2], start[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const Accumulator sum =
        warp_operation<Accumulator>(ISOFORM_SITE, 0xffffffffu, fragments, multiply<Element>);
    std::memcpy(result, sum.values, sizeof sum);
}

// accumulator += A B.
template <class Element>
void mma_m16n8k16(float (&accumulator)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                  ISOFORM_HERE) {
    mma_m16n8k16<Element>(accumulator, a, b, accumulator, file, line);
}

inline void ldmatrix_x4(unsigned (&matrices)[4], const void* row, ISOFORM_HERE) {
    using namespace isoform::emulate;
    require_alignment(ISOFORM_SITE, row);
    const Words words = load_matrices<false>(ISOFORM_SITE, row);
    std::memcpy(matrices, words.values, sizeof words);
}

inline void ldmatrix_x4_trans(unsigned (&matrices)[4], const void* row, ISOFORM_HERE) {
    using namespace isoform::emulate;
    require_alignment(ISOFORM_SITE, row);
    const Words words = load_matrices<true>(ISOFORM_SITE, row);
    std::memcpy(matrices, words.values, sizeof words);
}

// Copy 16 bytes to shared memory, zeros where they are not wanted. As late as the device may: the
// bytes arrive when the thread waits for them, so that who forgets to wait reads what was there before.
inline void cp_async_16(void* shared, const void* global, bool wanted = true, ISOFORM_HERE) {
    using namespace isoform::emulate;
    require_alignment(ISOFORM_SITE, shared);
    if (wanted) {
        require_alignment(ISOFORM_SITE, global);
    }
    copy_later(shared, wanted ? global : nullptr);
}

inline void cp_async_commit() {
    isoform::emulate::close_group();
}

// Wait until `pending` groups of copies at most are under way.
template <unsigned pending>
void cp_async_wait() {
    isoform::emulate::wait_for_copies(pending);
}

// Signals of those that have arrived

using isoform::emulate::Signal;

inline void expect(Signal* signal, int arrivals) {
    const auto count = static_cast<std::uint16_t>(arrivals);
    *signal = {count, count, 0};
}

inline void arrive(Signal* signal, ISOFORM_HERE) {
    isoform::emulate::arrive_at(ISOFORM_SITE, *signal);
}

inline void wait_for(Signal* signal, unsigned phase, ISOFORM_HERE) {
    isoform::emulate::wait_at(ISOFORM_SITE, *signal, phase);
}

// Tiles that are fetched

using isoform::emulate::TileMap;

inline void arrive_expecting(Signal* signal, int bytes, ISOFORM_HERE) {
    isoform::emulate::expect_bytes(*signal, static_cast<std::uint32_t>(bytes));
    arrive(signal, file, line);
}

inline void fetch_tile(void* shared, const TileMap& map, int at0, int at1, int at2, int at3, int at4,
                       Signal* signal, ISOFORM_HERE) {
    isoform::emulate::fetch_later(ISOFORM_SITE, shared, map, {at0, at1, at2, at3, at4}, *signal);
}
