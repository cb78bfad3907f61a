// The gradient of a bias, and of a weight if there is one, from what each chunk of rows adds to it:
// their sum, rounded once.
//
// A block has 32 columns, and a thread of each every 32nd chunk. The order is fixed.
//
// Defines: ELEMENT (see primitives.cuh).

#include "fused_arguments.cuh"
#include "primitives.cuh"

constexpr int LANES = 32;

extern "C" __global__ void __launch_bounds__(LANES * LANES)
    column_sums(const __grid_constant__ FusedArguments a) {
    __shared__ float kept[LANES][LANES];
    const int64 column = static_cast<int64>(blockIdx.x) * LANES + threadIdx.x;
    const float *const parts = static_cast<const float *>(a.parts);
    const int64 columns = a.dweight ? 2 * a.columns : a.columns;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int64 chunk = threadIdx.y; chunk < a.chunks; chunk += LANES) {
            sum += parts[chunk * columns + column];
        }
    }
    kept[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
        float total = 0.0f;
        for (int y = 0; y < LANES; ++y) total += kept[y][threadIdx.x];
        const bool of_bias = column < a.columns;
        Element *const place = static_cast<Element *>(of_bias ? a.dbias : a.dweight);
        round_to(total, &place[of_bias ? column : column - a.columns]);
    }
}
