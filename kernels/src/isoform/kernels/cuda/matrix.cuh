// A matrix as it lies, as kernels that pass over rows are told of it. All fields are 8 bytes wide.

#pragma once

#include <cuda/std/cstdint>

using int64 = cuda::std::int64_t;
using uint64 = cuda::std::uint64_t;

// Adjacent columns, and rows evenly apart.
struct Matrix {
    void *data;    // null where there is no such operand
    int64 stride;  // from one row to the next, in elements; 0 and < 0 are legal
};
