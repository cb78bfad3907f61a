// Who attends to whom, of single tokens and of whole tiles: a rule, never stored for pairs.
//
// Query i attends to key j if both are of one segment that is no padding, and if key j lies from
// `left` positions before the query to `right` after it (rule SEQ-3). Where neither positions nor
// segments are given (PLACES 0), tokens lie where their index says, and everything follows from
// numbers of tiles. Else (PLACES 1) a table has, for every 64 tokens, the least and the greatest
// position and segment, and for every 32 such spans what holds of them together: enough to pass over
// tiles in which no pair attends, a thousand or sixty thousand tokens at a time, and to know those in
// which all do.

#pragma once

#include "attention_arguments.cuh"
#include "primitives.cuh"

constexpr int SPAN = 64;   // tokens of a span
constexpr int GROUP = 32;  // spans of a group

// --- Finding one's place -------------------------------------------------------------------------

// The head of one example: what a block works on.
struct Head {
    int64 b, h;
};

// The key/value head that serves query head h.
__device__ inline Head group_of(const AttentionArguments &a, const Head &at) {
    return {at.b, at.h / (a.H / a.G)};
}

// The channels of one position, x[b, position, h, :].
template <class T = Element>
__device__ inline T *channels_of(const Operand &x, const Head &at, int64 position) {
    return static_cast<T *>(x.data) + at.b * x.stride[0] + position * x.stride[1] +
           at.h * x.stride[2];
}

// A number of query i, x[b, h, i]: lse or δ.
__device__ inline float &statistic_of(const Operand &x, const Head &at, int64 i) {
    return static_cast<float *>(
        x.data)[at.b * x.stride[0] + at.h * x.stride[1] + i * x.stride[2]];
}

// --- Tokens --------------------------------------------------------------------------------------

struct alignas(16) Token {
    int64 position, segment;  // a negative segment: padding, or no such token
};

// Queries, or keys, of one example.
struct Sequence {
    const Operand *positions, *segments;
    const Span *spans;  // the table, of this example
    int64 b, length;

    __device__ Token token(int64 n) const {
        if (n < 0 || n >= length) return {0, -1};
        Token token = {n, 0};
        if (positions->data != nullptr)
            token.position = static_cast<const int64 *>(
                positions->data)[b * positions->stride[0] + n * positions->stride[1]];
        if (segments->data != nullptr)
            token.segment = static_cast<const int64 *>(
                segments->data)[b * segments->stride[0] + n * segments->stride[1]];
        return token;
    }

    __device__ bool real(int64 n) const {
        if (n >= length) return false;
        return segments->data == nullptr ||
               static_cast<const int64 *>(
                   segments->data)[b * segments->stride[0] + n * segments->stride[1]] >= 0;
    }
};

// How long the table of a sequence is: its spans, in whole groups, and then the groups.
__device__ inline int64 groups_of(int64 length) {
    return (length + SPAN * GROUP - 1) / (SPAN * GROUP);
}
__device__ inline int64 table_of(int64 length) { return groups_of(length) * (GROUP + 1); }

__device__ inline Sequence queries_of(const AttentionArguments &a, int64 b) {
    return {&a.positions, &a.segments, a.query_spans + b * table_of(a.Q), b, a.Q};
}

__device__ inline Sequence keys_of(const AttentionArguments &a, int64 b) {
    return {&a.key_positions, &a.key_segments, a.key_spans + b * table_of(a.K), b, a.K};
}

// Rule SEQ-3. Differences of positions are exact in 64 bits.
__device__ inline bool attends(const AttentionArguments &a, const Token &query, const Token &key) {
    return query.segment == key.segment && query.segment >= 0 &&
           key.position - query.position >= -a.left && key.position - query.position <= a.right;
}

// --- Spans ---------------------------------------------------------------------------------------

__device__ inline Span no_token() {
    constexpr int64 most = 0x7fffffffffffffff;
    return {most, -most - 1, most, -most - 1, 1};
}

__device__ inline Span span_of(const Token &token) {
    Span span = no_token();
    if (token.segment < 0) return span.whole = 0, span;
    return {token.position, token.position, token.segment, token.segment, 1};
}

__device__ inline Span together(const Span &x, const Span &y) {
    return {x.low < y.low ? x.low : y.low, x.high > y.high ? x.high : y.high,
            x.first < y.first ? x.first : y.first, x.last > y.last ? x.last : y.last,
            x.whole & y.whole};
}

// Whether any of the queries may attend to any of the keys; if not, none does.
__device__ inline bool may_attend(const AttentionArguments &a, const Span &queries,
                                  const Span &keys) {
    return queries.low <= queries.high && keys.low <= keys.high &&
           keys.high - queries.low >= -a.left && keys.low - queries.high <= a.right &&
           keys.first <= queries.last && queries.first <= keys.last;
}

// Whether each of the queries attends to each of the keys.
__device__ inline bool all_attend(const AttentionArguments &a, const Span &queries,
                                  const Span &keys) {
    return queries.whole && keys.whole && queries.first == queries.last &&
           keys.first == keys.last && queries.first == keys.first &&
           keys.low - queries.high >= -a.left && keys.high - queries.low <= a.right;
}
