// What the rotary kernel is given: one struct, by value.
//
// `isoform/kernels/rotary_launch.py` mirrors it field by field; a test holds the two together. All
// fields but the two of the amplitude are 8 bytes wide: there is no padding to agree about.
//
// The letters are those of the contract (docs/spec/rotary.md): B batch, L tokens, H heads, D head dim,
// d how many channels are turned.

#pragma once

#include <cuda/std/cstdint>

using int64 = cuda::std::int64_t;
using uint64 = cuda::std::uint64_t;

// An array of the caller's, as it lies: no layout is demanded of it.
struct Rows {
    void *data;       // null where there is no such operand
    int64 stride[4];  // in elements, along B, L, H and D; 0 and < 0 are legal
};

// ω / 2π, the part of a turn that a pair makes from one position to the next, modulo 1, in units of
// 2^-128.
struct Frequency {
    uint64 high, low;
};

// A number as the sum of two floats: nearly twice the digits.
struct Twofold {
    float high, low;
};

constexpr int MOST_PAIRS = 128;  // a kernel's arguments may take 4 KiB

struct RotaryArguments {
    int64 B, L;

    Rows x, out;            // [B, L, H, D]; the same array where it is turned in place
    Rows other, out_other;  // keys beside queries, with heads of their own
    Rows positions;         // [B, L]

    int64 heads, other_heads;               // H of each; 0 where there is no such array

    int64 position_bytes, position_signed;  // the integers that positions are
    int64 pairs;                            // d / 2
    int64 passing;                          // vectors of a row that pass through, and are copied
    int64 passing_width;                    // elements of such a vector: WIDTH, or 16 bytes of them
    int64 tokens;                           // of a block
    int64 backwards;                        // 1: by −θ

    Twofold amplitude;
    Frequency frequency[MOST_PAIRS];
};

static_assert(sizeof(RotaryArguments) == 2 * 8 + 5 * 40 + 9 * 8 + 8 + MOST_PAIRS * 16,
              "rotary_launch.py has another idea of RotaryArguments");
