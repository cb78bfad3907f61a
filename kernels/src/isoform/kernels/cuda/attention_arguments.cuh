// What every kernel of attention over a sequence is given: one struct, by value.
//
// `isoform/kernels/attention_arguments.py` mirrors it field by field; a test holds the two together.
//
// The letters are those of the contract (docs/spec/attention.md): B batch, Q queries, K keys, H query
// heads, G key/value heads, D head dim.

#pragma once

#include "blocks.cuh"

// An array of the caller's, as it lies: no layout is demanded of it.
struct Operand {
    void *data;       // null where the operand is absent, or the result not wanted
    int64 stride[4];  // in elements, by axis as named beside each operand below; 0 and < 0 are legal
};

// What is known of a range of tokens, padding aside.
struct Span {
    int64 low, high;    // the least and the greatest position; low > high where all is padding
    int64 first, last;  // likewise of the segments
    int64 whole;        // whether none is padding, and none beyond the sequence's end
};

struct AttentionArguments {
    int64 B, Q, K, H, G, D;

    Operand q;    // [B, Q, H, D]
    Operand k;    // [B, K, G, D]
    Operand v;    // [B, K, G, D]
    Operand out;  // [B, Q, H, D]
    Operand lse;  // [B, H, Q]     float; a result of the forward, and an operand of the backward

    Operand dout;   // [B, Q, H, D]
    Operand delta;  // [B, H, Q]   float, Σ_d dout_id out_id
    Operand dq;     // like q, and so on
    Operand dk;
    Operand dv;

    Operand positions;      // [B, Q]  int64; where absent, tokens lie where their index says
    Operand key_positions;  // [B, K]
    Operand segments;       // [B, Q]  int64; where absent, all are 0
    Operand key_segments;   // [B, K]

    Span *query_spans;  // the tables that attention_spans makes, see attention_mask.cuh
    Span *key_spans;

    int64 left, right;  // how far before and after its own position a query looks; no end: 2^63 − 1
    int64 wide;         // out, dq, dk and dv are float, whatever the operands are

    float scale;
};

static_assert(sizeof(Operand) == 40, "attention_arguments.py has another idea of Operand");
static_assert(sizeof(AttentionArguments) == 6 * 8 + 14 * 40 + 5 * 8 + 8,
              "attention_arguments.py has another idea of AttentionArguments");
