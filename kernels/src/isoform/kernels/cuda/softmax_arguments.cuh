// What the kernels of the masked softmax are given: one struct, by value.
//
// `isoform/kernels/softmax_launch.py` mirrors it field by field; a test holds the two together.

#pragma once

#include "matrix.cuh"

struct SoftmaxArguments {
    int64 rows, keys;      // a row for each query of each head of each batch item
    int64 heads, queries;  // rows are [B, heads, queries]
    int64 causal;          // whether query i attends to keys j ≤ i only

    Matrix scores, probabilities, dout;
    Matrix out;  // or dscores

    void *mask;             // [B, heads, queries, keys] bytes, 0 where a query does not attend
    int64 mask_strides[3];  // in bytes, of all but the keys, which are adjacent; 0 where there is one for all

    float scale, unused;
};

static_assert(sizeof(SoftmaxArguments) == 5 * 8 + 4 * 16 + 4 * 8 + 8,
              "softmax_launch.py has another idea of SoftmaxArguments");
