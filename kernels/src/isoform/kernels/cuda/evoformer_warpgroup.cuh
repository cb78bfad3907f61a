// What the kernels for Hopper have in common: blocks where some warps copy and the others multiply.
//
// Four warps, a team, multiply 64 rows by a tile that lies in shared memory where it is (`wgmma`); each of
// them has sixteen of the rows. One team more copies the next tiles meanwhile, and gives its registers to
// the others: who multiplies issues no copies, and waits for nobody else, warp by warp. A block does one
// piece of work after the other: there are as many blocks as can be at once.
//
// Where there are no such instructions, and in the emulator, each warp multiplies its sixteen rows by
// itself.
//
// Defines, besides those of evoformer_tensor.cuh: TEAMS, those that multiply; STAGES, how many tiles there
// are to be copied ahead; FEWER, the registers of a thread that copies. Rows of all operands, and of the
// pair bias, which must be there, are copied 16 bytes at a time. M_TILES is 1.

#pragma once

#include "evoformer_tensor.cuh"

constexpr int MULTIPLYING = 128 * TEAMS, COPYING = 128;  // threads
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes, in a row
constexpr int CHANNEL_TILES = HEAD_DIM / 8;

// Registers of a thread that multiplies: all threads have as many at first, in eights, of what there are,
// and then those that copy give theirs.
constexpr int EQUAL_SHARE = 65536 / (MULTIPLYING + COPYING) / BLOCKS / 8 * 8;
constexpr int MORE = (EQUAL_SHARE + (EQUAL_SHARE - FEWER) / TEAMS) / 8 * 8;
static_assert((TEAMS * MORE + FEWER) * 128 * BLOCKS <= 65536 && FEWER % 8 == 0 && FEWER >= 24,
              "these are not the registers that there are");
static_assert(M_TILES == 1 && ALIGNED && ALIGNED_BIAS && PAIR_BIAS && !GATED,
              "this is all that these kernels do");

// Rows in columns of pieces, as a team's products read them. Two MORE_ROWS in every column: the pieces of two
// rows that eight threads copy lie in different banks.
template <int SIZE, int COUNT = PIECES, int MORE_ROWS = 2>
struct Columns {
    uint4 piece[COUNT][SIZE + MORE_ROWS];

    static constexpr unsigned PIECE_STEP = 16 * (SIZE + MORE_ROWS);
};

// What all lanes have, so that the compiler knows.
__device__ inline int uniform(int x) { return __shfl_sync(ALL_LANES, x, 0); }

// What there are OF of are used in turn. The phase changes each time round.
template <unsigned OF>
struct InTurn {
    unsigned count = 0;

    __device__ int stage() const { return count % OF; }
    __device__ unsigned phase() const { return count / OF % 2; }
};

using Turn = InTurn<STAGES>;

// What a block does at a time: SIZE queries or keys from `first` on, of one head, of the MANY rows from at.s
// on.
template <int SIZE, int MANY>
struct Place {
    Head at;
    int64 first;

    // Of the `length` queries or keys, and of so many heads, what `work` of them is.
    __device__ Place(const EvoformerArguments &a, int64 length, int64 heads, unsigned work) {
        Blocks block = {work};
        first = block.next(tiles_of(length, SIZE)) * SIZE;
        at.h = block.next(heads), at.s = block.next(tiles_of(a.S, MANY)) * MANY, at.b = block.rest;
    }

    __device__ Head row(int r) const { return {at.b, at.s + r, at.h}; }

    // How many there are.
    __device__ static unsigned count(const EvoformerArguments &a, int64 length, int64 heads) {
        return static_cast<unsigned>(a.B * heads) * tiles_of(a.S, MANY) * tiles_of(length, SIZE);
    }
};

// --- Products --------------------------------------------------------------------------------------
//
// Between warpgroup_begin() and warpgroup_commit(); they are there after warpgroup_wait().

// The warp's sixteen rows, from `row` on, as a left operand in registers.
template <int SIZE>
__device__ inline void load_left(unsigned (&x)[STEPS][4], const Columns<SIZE> &rows, int row) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        ldmatrix_x4(x[step], &rows.piece[2 * step + lane() / 16][row + lane() % 16]);
}

// x = left · rightᵀ, or that added: of 8 N rows of `right`, from `first` on.
template <int N, int SIZE>
__device__ inline void multiply_rows(float (&x)[N][4], const unsigned (&left)[STEPS][4],
                                     const Columns<SIZE> &right, int first, bool add = false) {
#ifdef ISOFORM_WARPGROUPS
    const TileName b = by_rows(shared_address(&right.piece[0][first]), right.PIECE_STEP);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        warpgroup_multiply_rows(x, left[step], b.at(step * 2 * right.PIECE_STEP), add || step > 0);
#else
    if (!add)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[n][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned words[4];
            ldmatrix_x4(words, &right.piece[2 * step + lane() / 8 % 2]
                                           [first + 8 * n + lane() % 8 + 8 * (lane() / 16)]);
            const unsigned even[2] = {words[0], words[1]}, odd[2] = {words[2], words[3]};
            mma_m16n8k16<Element>(x[n], left[step], even);
            mma_m16n8k16<Element>(x[n + 1], left[step], odd);
        }
#endif
}

// A tile and its name, as products know it.
template <int SIZE>
struct Named {
    const Columns<SIZE> &rows;
#ifdef ISOFORM_WARPGROUPS
    TileName name;
#endif
};

// A name is made of an address, anew each time.
template <int SIZE>
__device__ inline Named<SIZE> named(const Columns<SIZE> &rows) {
#ifdef ISOFORM_WARPGROUPS
    return {rows, by_rows(shared_address(&rows), rows.PIECE_STEP)};
#else
    return {rows};
#endif
}

// Once and for all: others are made of it by an addition, see after().
template <int SIZE>
__device__ inline Named<SIZE> named_once(const Columns<SIZE> &rows) {
#ifdef ISOFORM_WARPGROUPS
    TileName name = named(rows).name;
    name.low = uniform(name.low);  // what is from another lane the compiler cannot compute again
    return {rows, name};
#else
    return {rows};
#endif
}

// The tile that lies so many pieces after one that has a name.
template <int SIZE>
__device__ inline Named<SIZE> after(const Named<SIZE> &tile, int pieces) {
    const uint4 *place = reinterpret_cast<const uint4 *>(&tile.rows) + pieces;
    const Columns<SIZE> &rows = *reinterpret_cast<const Columns<SIZE> *>(place);
#ifdef ISOFORM_WARPGROUPS
    return {rows, tile.name.after(pieces)};
#else
    return {rows};
#endif
}

// The same with a left operand in shared memory, the warp's rows from `row` on.
template <int N, int LEFT, int RIGHT>
__device__ inline void multiply_rows(float (&x)[N][4], const Named<LEFT> &left, int row,
                                     const Named<RIGHT> &right, int first, bool add = false) {
#ifdef ISOFORM_WARPGROUPS
    const TileName a = left.name.after(row / 64 * 64), b = right.name.after(first);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        warpgroup_multiply_rows(x, a.at(step * 2 * left.rows.PIECE_STEP),
                                b.at(step * 2 * right.rows.PIECE_STEP), add || step > 0);
#else
    unsigned a[STEPS][4];
    load_left(a, left.rows, row);
    multiply_rows(x, a, right.rows, first, add);
#endif
}

template <int N, int LEFT, int RIGHT>
__device__ inline void multiply_rows(float (&x)[N][4], const Columns<LEFT> &left, int row,
                                     const Columns<RIGHT> &right, int first, bool add = false) {
    multiply_rows(x, named(left), row, named(right), first, add);
}

// x += left · right, for 16 N columns of the warp's rows of `left` and as many rows of `right`, from
// `first` on.
template <int N, int SIZE>
__device__ inline void multiply_columns(float (&x)[CHANNEL_TILES][4], const unsigned (&left)[N][4],
                                        const Columns<SIZE> &right, int first) {
#ifdef ISOFORM_WARPGROUPS
    const TileName b = by_columns(shared_address(&right.piece[0][first]), right.PIECE_STEP);
#pragma unroll
    for (int n = 0; n < N; ++n) warpgroup_multiply_columns(x, left[n], b.at(256 * n));
#else
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4_trans(words,
                              &right.piece[2 * step + lane() / 16][first + 16 * n + lane() % 16]);
            const unsigned even[2] = {words[0], words[1]}, odd[2] = {words[2], words[3]};
            mma_m16n8k16<Element>(x[2 * step], left[n], even);
            mma_m16n8k16<Element>(x[2 * step + 1], left[n], odd);
        }
#endif
}

// --- The pair bias of keys of which some are dropped -----------------------------------------------

// What a tile of keys brings to the logits besides k. `choice` says how an element of the pair bias
// becomes a float, −inf where the key is dropped: for bfloat16, which bytes of the pair that it is in,
// and of −inf, make it up; for float16, where the pair has bits that are kept.
struct alignas(16) KeyTile {
    unsigned choice[BLOCK];
    float bias[MASK_BIAS ? BLOCK : 4];
    unsigned any, unused[3];  // whether any is kept
};

#if ELEMENT == 2
constexpr unsigned DROPPED = 0x7644;
__device__ inline unsigned choice_of(int j) { return j % 2 == 0 ? 0x1044 : 0x3244; }
__device__ inline float2 choose(unsigned pair, uint2 choice) {
    return make_float2(__uint_as_float(choose_bytes(pair, 0xff800000u, choice.x)),
                       __uint_as_float(choose_bytes(pair, 0xff800000u, choice.y)));
}
#else
constexpr unsigned DROPPED = 0;
__device__ inline unsigned choice_of(int j) { return j % 2 == 0 ? 0xffffu : 0xffff0000u; }
__device__ inline float2 choose(unsigned pair, uint2 choice) {
    const unsigned keep = choice.x | choice.y;
    return unpack((pair & keep) | (~keep & MINUS_INFINITIES));
}
#endif

// --- The warps that copy ---------------------------------------------------------------------------

__device__ inline int copier() { return static_cast<int>(threadIdx.x) - MULTIPLYING; }

// Some threads' part in copying rows of 16-byte pieces into columns: each has the same piece of every
// AT_ONCE-th row.
template <int THREADS>
struct RowCopier {
    static constexpr int AT_ONCE = THREADS / (PIECES == 6 ? 8 : PIECES);  // a divisor of every SIZE

    int row, piece;
    bool there;  // whether the thread has any, and they have channels

    __device__ RowCopier(const EvoformerArguments &a, int thread)
        : row(thread / PIECES), piece(thread % PIECES),
          there(thread < AT_ONCE * PIECES && 8 * piece < static_cast<int>(a.D)) {}

    __device__ const Element *first(const Element *origin, int64 stride) const {
        return origin + row * stride + 8 * piece;
    }

    // Zeros in rows that are not wanted, which are not even read (rule EVO-4), and beyond D. `from` is
    // the thread's first piece.
    template <int SIZE, class Wanted>
    __device__ void copy(Columns<SIZE> &tile, const Element *from, int64 stride,
                         const Wanted &wanted) const {
        if (row >= AT_ONCE) return;
        uint4 *to = &tile.piece[piece][row];
#pragma unroll 4
        for (int i = 0; i < SIZE; i += AT_ONCE) {
            cp_async_16(to + i, from, there && wanted(i));
            from += AT_ONCE * stride;
        }
    }

    // The same, of the tile's rows from `first` on, where a row that is wanted has its bit, or `all` are and
    // have all channels: what a copy takes besides itself is then to know where from.
    template <int SIZE, int WORDS>
    __device__ void copy(Columns<SIZE> &tile, const Element *from, int64 stride,
                         const unsigned (&wanted)[WORDS], bool all, int first = 0) const {
        static_assert(32 % AT_ONCE == 0, "a thread's rows have the same bits of all words");
        if (row >= AT_ONCE) return;
        uint4 *to = &tile.piece[piece][first + row + unknown_zero()];
        if (all) {
#pragma unroll 16
            for (int i = 0; i < 32 * WORDS; i += AT_ONCE) {
                cp_async_16(to + i, from);
                from = anew(from + AT_ONCE * stride);
            }
            return;
        }
#pragma unroll
        for (int word = 0; word < WORDS; ++word) {
            const unsigned ours = there ? wanted[word] >> row : 0;
#pragma unroll
            for (int i = 0; i < 32; i += AT_ONCE) {
                cp_async_16(to + 32 * word + i, from, (ours >> i & 1) != 0);
                from = anew(from + AT_ONCE * stride);
            }
        }
    }
};

// --- Results ---------------------------------------------------------------------------------------

// Whether pairs of neighbouring channels can be written as 4 bytes.
__device__ inline bool in_pairs(const Operand &x) {
    const int64 odd = static_cast<int64>(reinterpret_cast<cuda::std::uintptr_t>(x.data)) / 2 |
                      x.stride[0] | x.stride[1] | x.stride[2] | x.stride[3];
    return odd % 2 == 0 && x.stride[4] == 1;
}

// Writes a lane's channels of one row of x: `of(n, e)` is that of 8 n + 2 (lane % 4) + e.
template <class Of>
__device__ inline void store_row(const EvoformerArguments &a, const Operand &x, Element *row,
                                 bool by_pairs, const Of &of) {
    const int channels = static_cast<int>(a.D), first = 2 * (lane() % 4) + unknown_zero();
    if (by_pairs) {
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
            if (8 * n < channels)
                *reinterpret_cast<unsigned *>(row + first + 8 * n) = pack(of(n, 0), of(n, 1));
    } else {
        rarely();
#pragma unroll
        for (int n = 0; n < CHANNEL_TILES; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * n < channels)
                    round_to(of(n, e), row + (first + 8 * n + e) * x.stride[4]);
    }
}
