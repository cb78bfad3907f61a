// What every Evoformer kernel is given: one struct, by value.
//
// `isoform/kernels/arguments.py` mirrors it field by field; a test holds the two together. All
// fields but the last are 8 bytes wide, so there is no padding to agree about.
//
// The letters are those of the contract (docs/spec/evoformer.md): B batch, S rows that share one
// pair bias, Q queries, K keys, H query heads, G key/value heads, D head dim.

#pragma once

#include "blocks.cuh"

using uint8 = cuda::std::uint8_t;
using uint16 = cuda::std::uint16_t;
using uint64 = cuda::std::uint64_t;

// An array of the caller's, as it lies: no layout is demanded of it.
struct Operand {
    void *data;       // null where the operand is absent, or the result not wanted
    int64 stride[5];  // in elements, by axis as named beside each operand below; 0 and < 0 are legal
};

struct EvoformerArguments {
    int64 B, S, Q, K, H, G, D;

    Operand q;          // [B, S, Q, H, D]
    Operand k;          // [B, S, K, G, D]
    Operand v;          // [B, S, K, G, D]
    Operand mask;       // [B, S, K]            one byte each, 0 drops the key
    Operand mask_bias;  // [B, S, 1, 1, K]
    Operand pair_bias;  // [B, 1, H, Q, K]
    Operand gate;       // [B, S, Q, H, D]
    Operand out;        // [B, S, Q, H, D]
    Operand lse;        // [B, S, H, Q]         float

    Operand dout;        // [B, S, Q, H, D]
    Operand dq;          // like q, and so on
    Operand dk;
    Operand dv;
    Operand dmask_bias;
    Operand dpair_bias;
    Operand dgate;

    // What one kernel leaves for the next ones, contiguous [B, S, H, Q].
    float *top;    // the largest logit of a query, −inf where it has no key left
    float *total;  // Σ_j exp(s_ij − top_i)
    uint16 *total_code;  // the same in three bytes, see evoformer_tensor.cuh
    uint8 *total_more;
    float *delta;  // Σ_d dō_id o_id

    // What the tensor-core kernels add up in parts: dmask_bias by key/value head, [B, S, G, K], and
    // dpair_bias by ranges of rows s, for each tile, with whose turn it is: how many have been added;
    // and behind those, how many blocks have started.
    float *mask_bias_parts;
    float *pair_bias_sums;
    int *turns;
    int64 parts, pair_bias_tiles;

    float scale;
};

static_assert(sizeof(Operand) == 48, "arguments.py has another idea of Operand");
static_assert(sizeof(EvoformerArguments) == 7 * 8 + 16 * 48 + 10 * 8 + 8,
              "arguments.py has another idea of EvoformerArguments");
