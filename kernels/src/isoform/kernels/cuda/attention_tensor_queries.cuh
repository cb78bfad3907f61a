// What the kernels have in common that own queries while keys stream by: forward and backward_query.

#pragma once

#include "attention_tensor.cuh"

struct Shared {
    struct {
        Row k[BLOCK], v[BLOCK];
    } stage[2];  // before and after, the second one holds what is read and written of the queries
    Places places;
};

static_assert(OWNED <= 2 * BLOCK, "what a block owns fits into one stage");
static_assert(sizeof(Shared) == SHARED_BYTES, "the host has another idea of the shared memory");

// Starts to copy k and v of tile t of the keys, the n-th that is visited: of the key/value head `group`,
// whose tokens have been written.
__device__ inline void load_keys(Shared &shared, const AttentionArguments &a, const Head &group,
                                 int thread, int n, int t) {
    const int64 first = static_cast<int64>(t) * BLOCK;
    const auto wanted = [&](int j) {
#if PLACES
        return shared.places.streamed[n % 4][j].segment >= 0;
#else
        return first + j < a.K;
#endif
    };
    load_rows<BLOCK, THREADS>(shared.stage[n % 2].k, a, a.k, group, first, thread, wanted);
    load_rows<BLOCK, THREADS>(shared.stage[n % 2].v, a, a.v, group, first, thread, wanted);
}

#if PLACES
// The thread's token of tile t, if it has one; and to where the n-th tile's are looked for.
__device__ inline Token read_token(const Sides<false> &sides, int thread, int t) {
    return sides.streamed().token(
        t < 0 || thread >= BLOCK ? -1 : static_cast<int64>(t) * BLOCK + thread);
}
__device__ inline void write_token(Shared &shared, int thread, int n, const Token &token) {
    if (thread < BLOCK) shared.places.streamed[n % 4][thread] = token;
}
#endif
