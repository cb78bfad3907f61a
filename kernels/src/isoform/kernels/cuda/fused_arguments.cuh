// What the kernels of bias and GeLU, of bias, dropout and residual, and of LayerNorm are given: one
// struct, by value.
//
// `isoform/kernels/fused_launch.py` mirrors it field by field; a test holds the two together. All
// fields but the last two are 8 bytes wide: there is no padding to agree about.

#pragma once

#include "matrix.cuh"

struct FusedArguments {
    int64 rows, columns;  // tokens, and channels

    Matrix x, residual, dout;
    Matrix out;  // or dx

    void *bias, *dbias, *weight, *dweight;  // [columns]
    void *seed;        // one integer of 64 bits, which the host does not look at
    void *statistics;  // [rows, 2] float: a row's mean, and the inverse of its deviation
    void *parts;       // [chunks, 1 or 2, columns] float: what each chunk of rows adds to dbias, dweight

    int64 chunks;     // into which the rows are dealt; each has the same columns summed by one block
    int64 tiles;      // into which the columns are
    int64 threshold;  // of 65536 draws, how many are dropped

    float epsilon, unused;
};

static_assert(sizeof(FusedArguments) == 2 * 8 + 4 * 16 + 7 * 8 + 3 * 8 + 8,
              "fused_launch.py has another idea of FusedArguments");
