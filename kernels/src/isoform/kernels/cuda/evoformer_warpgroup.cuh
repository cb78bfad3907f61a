// What the kernels for Hopper have in common: blocks where some warps copy and the others multiply.
//
// Four warps, a team, multiply 64 rows by a tile that lies in shared memory where it is (`wgmma`); each of
// them has sixteen of the rows. One team more gives its registers to the others, and sees to the next tiles
// meanwhile. One of its threads has them fetched, which takes an instruction a box, whatever its size. Its
// other warps read what there is to be told of a tile, and when it is there, make zeros of rows that must not be
// seen. Who multiplies issues no copies, and waits for nobody else, warp by warp. A block does one piece of
// work after the other: there are as many blocks as can be at once.
//
// Where there are no such instructions, and in the emulator, each warp multiplies its sixteen rows by
// itself.
//
// Defines, besides those of evoformer_tensor.cuh: TEAMS, those that multiply; STAGES, how many tiles there
// are to be fetched ahead; FEWER, the registers of a thread that copies. Rows of all operands, and of the
// pair bias, which must be there, begin on 16 bytes. M_TILES is 1.

#pragma once

#include "evoformer_tensor.cuh"

constexpr int MULTIPLYING = 128 * TEAMS, COPYING = 128;  // threads
constexpr int CHANNEL_TILES = HEAD_DIM / 8;

// Registers of a thread that multiplies: all threads have as many at first, in eights, of what there are,
// and then those that copy give theirs.
constexpr int EQUAL_SHARE = 65536 / (MULTIPLYING + COPYING) / BLOCKS / 8 * 8;
constexpr int MORE = (EQUAL_SHARE + (EQUAL_SHARE - FEWER) / TEAMS) / 8 * 8;
static_assert((TEAMS * MORE + FEWER) * 128 * BLOCKS <= 65536 && FEWER % 8 == 0 && FEWER >= 24,
              "these are not the registers that there are");
static_assert(M_TILES == 1 && ALIGNED && ALIGNED_BIAS && PAIR_BIAS && !GATED,
              "this is all that these kernels do");

// A row of 64 elements of a tile that is fetched. Its pieces are swizzled: those of eight rows at the same
// place lie in different banks.
struct SwizzledRow {
    uint4 pieces[8];

    // The row is number `row` of the tile, or that plus a multiple of 8.
    __device__ const uint4 *piece(int p, int row) const { return pieces + (p ^ row % 8); }
};

// Rows of channels as they are fetched: in boxes of sixteen channels, rows of which are adjacent, two pieces
// each, swizzled. (Pieces by themselves would come from memory twice: 32 bytes are the least.)
template <int SIZE>
struct Boxes {
    uint4 pieces[STEPS][SIZE][2];

    static constexpr unsigned STEP = 32 * SIZE;  // bytes from box to box

    __device__ const uint4 *piece(int p, int row) const {
        return &pieces[p / 2][row][p % 2 ^ row / 4 % 2];
    }
    __device__ void clear(int row) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) pieces[step][row][0] = pieces[step][row][1] = {};
    }
};

// Fetches SIZE rows of x[b, s, :, h, :], from `first` on. Zeros beyond what there is.
template <int SIZE>
__device__ inline void fetch_rows(Boxes<SIZE> &rows, const TileMap &x, int first, int h, int s, int b,
                                  Signal *signal) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        fetch_tile(rows.pieces[step], x, 16 * step, first, h, s, b, signal);
}

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
__device__ inline void load_left(unsigned (&x)[STEPS][4], const Boxes<SIZE> &rows, int row) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        ldmatrix_x4(x[step], rows.piece(2 * step + lane() / 16, row + lane() % 16));
}

// A tile and its name, as products know it.
template <int SIZE>
struct Named {
    const Boxes<SIZE> &rows;
#ifdef ISOFORM_WARPGROUPS
    TileName name;
#endif
};

// A name is made of an address, anew each time.
template <int SIZE>
__device__ inline Named<SIZE> named(const Boxes<SIZE> &rows) {
#ifdef ISOFORM_WARPGROUPS
    return {rows, swizzled(shared_address(&rows), rows.STEP)};
#else
    return {rows};
#endif
}

// Once and for all: others are made of it by an addition, see after().
template <int SIZE>
__device__ inline Named<SIZE> named_once(const Boxes<SIZE> &rows) {
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
    const Boxes<SIZE> &rows = *reinterpret_cast<const Boxes<SIZE> *>(place);
#ifdef ISOFORM_WARPGROUPS
    return {rows, tile.name.after(pieces)};
#else
    return {rows};
#endif
}

// x = left · rightᵀ, or that added: of 8 N rows of `right`, from `first` on.
template <int N, int SIZE>
__device__ inline void multiply_rows(float (&x)[N][4], const unsigned (&left)[STEPS][4],
                                     const Boxes<SIZE> &right, int first, bool add = false) {
#ifdef ISOFORM_WARPGROUPS
    const TileName b = swizzled(shared_address(right.pieces[0][first]));
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        warpgroup_multiply_rows(x, left[step], b.at(step * right.STEP), add || step > 0);
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
            ldmatrix_x4(words, right.piece(2 * step + lane() / 8 % 2,
                                           first + 8 * n + lane() % 8 + 8 * (lane() / 16)));
            const unsigned even[2] = {words[0], words[1]}, odd[2] = {words[2], words[3]};
            mma_m16n8k16<Element>(x[n], left[step], even);
            mma_m16n8k16<Element>(x[n + 1], left[step], odd);
        }
#endif
}

// The same with a left operand in shared memory, the warp's rows from `row` on.
template <int N, int LEFT, int RIGHT>
__device__ inline void multiply_rows(float (&x)[N][4], const Named<LEFT> &left, int row,
                                     const Named<RIGHT> &right, int first, bool add = false) {
#ifdef ISOFORM_WARPGROUPS
    const TileName a = left.name.at(32 * (row / 64 * 64)), b = right.name.at(32 * first);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
        warpgroup_multiply_rows(x, a.at(step * left.rows.STEP), b.at(step * right.rows.STEP),
                                add || step > 0);
#else
    unsigned a[STEPS][4];
    load_left(a, left.rows, row);
    multiply_rows(x, a, right.rows, first, add);
#endif
}

template <int N, int LEFT, int RIGHT>
__device__ inline void multiply_rows(float (&x)[N][4], const Boxes<LEFT> &left, int row,
                                     const Boxes<RIGHT> &right, int first, bool add = false) {
    multiply_rows(x, named(left), row, named(right), first, add);
}

// x += left · right, for 16 N columns of the warp's rows of `left` and as many rows of `right`, from
// `first` on.
template <int N, int SIZE>
__device__ inline void multiply_columns(float (&x)[CHANNEL_TILES][4], const unsigned (&left)[N][4],
                                        const Boxes<SIZE> &right, int first) {
#ifdef ISOFORM_WARPGROUPS
    const TileName b = swizzled(shared_address(right.pieces[0][first]), right.STEP);
#pragma unroll
    for (int n = 0; n < N; ++n) warpgroup_multiply_columns(x, left[n], b.at(32 * 16 * n));
#else
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            unsigned words[4];
            ldmatrix_x4_trans(words, right.piece(2 * step + lane() / 16, first + 16 * n + lane() % 16));
            const unsigned even[2] = {words[0], words[1]}, odd[2] = {words[2], words[3]};
            mma_m16n8k16<Element>(x[2 * step], left[n], even);
            mma_m16n8k16<Element>(x[2 * step + 1], left[n], odd);
        }
#endif
}

// --- The same for all rows ------------------------------------------------------------------------
//
// What is to be added to a column of products, tensor cores add: it is the product of a column of ones and a
// row. No warp reads it.

// A number for each of a tile's rows that are to be columns. Row 0 of each piece has them, the others are
// zeros.
struct Additions {
    uint4 piece[BLOCK / 8][8];

    __device__ void make() {
        for (int i = threadIdx.x; i < BLOCK; i += blockDim.x) piece[i / 8][i % 8] = {};
    }
    __device__ Element *of(int column) {
        return reinterpret_cast<Element *>(&piece[column / 8][0]) + column % 8;
    }
    __device__ const Element *of(int column) const {
        return reinterpret_cast<const Element *>(&piece[column / 8][0]) + column % 8;
    }
};

// The left operand, of sixteen columns and eight rows that stand for all: columns 0 and 8 are halves. For both
// eights of columns it is the same piece of memory, and so it is for both eights of rows of what it is
// multiplied by.
struct Halves {
    uint4 row[8];

    __device__ void make() {
        for (int i = threadIdx.x; i < 64; i += blockDim.x)
            round_to(i % 8 == 0 ? 0.5f : 0.0f, reinterpret_cast<Element *>(row) + i);
    }
};

// Between warpgroup_begin() and warpgroup_commit(): to 8 N columns, from `first` on.
template <int N>
__device__ inline void add_to_columns(float (&x)[N][4], const Halves &halves, const Additions &additions,
                                      int first) {
#ifdef ISOFORM_WARPGROUPS
    warpgroup_multiply_columns(
        x, name_of(shared_address(&halves), 0, 0),
        by_columns(shared_address(additions.piece[first / 8]), sizeof(additions.piece[0]), 0));
#else
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            x[n][e] += to_float(*additions.of(first + 8 * n + 2 * (lane() % 4) + e % 2));
#endif
}

// --- Keys of which some are dropped ----------------------------------------------------------------

// Of a tile of keys, a bit for each: whether it is kept.
struct KeptKeys {
    unsigned word[BLOCK / 32];

    __device__ bool any() const { return (word[0] | word[1]) != 0; }
    __device__ bool operator()(int key) const { return (word[key / 32] >> key % 32 & 1) != 0; }
};

// A lane's keys of a row s, of each tile one of every 32: read a tile before they are needed, and left as
// they came, so that nobody waits for them.
struct LaneKeys {
    const unsigned char *mask;  // anything where there is none
    const Element *bias;
    int left;  // keys, from the lane's first on
    KeyStream::Raw raw[BLOCK / 32];

    __device__ void start(const EvoformerArguments &a, const Head &at, bool present) {
        mask = static_cast<const unsigned char *>(a.mask.data) + at.b * a.mask.stride[0] +
               at.s * a.mask.stride[1] + lane() * a.mask.stride[2];
        if (MASK_BIAS)
            bias = static_cast<const Element *>(a.mask_bias.data) + at.b * a.mask_bias.stride[0] +
                   at.s * a.mask_bias.stride[1] + lane() * a.mask_bias.stride[4];
        left = present ? static_cast<int>(a.K) - lane() : 0;
    }

    // The next tile's.
    __device__ void read(const EvoformerArguments &a) {
#pragma unroll
        for (int part = 0; part < BLOCK / 32; ++part) {
            const bool there = left > 32 * part;
            raw[part].mask = there;
            round_to(0.0f, &raw[part].bias);
            if (there && a.mask.data != nullptr) raw[part].mask = mask[32 * part * a.mask.stride[2]];
            if (MASK_BIAS && there) raw[part].bias = bias[32 * part * a.mask_bias.stride[4]];
        }
        left -= BLOCK;
        mask += BLOCK * a.mask.stride[2];
        if (MASK_BIAS) bias += BLOCK * a.mask_bias.stride[4];
    }

    // Tells of the tile that was read, and returns a bit for each of the lane's keys. Where there is a mask
    // bias, it is what is to be added to logits, −inf where the key is dropped; where there is none, what is to
    // be added before they are scaled.
    __device__ unsigned tell(const EvoformerArguments &a, Additions &mask, KeptKeys &kept) const {
        unsigned ours = 0;
#pragma unroll
        for (int part = 0; part < BLOCK / 32; ++part) {
            const bool keep = raw[part].mask != 0;
            Element *place = mask.of(lane() + 32 * part);
            if (MASK_BIAS && keep)
                *place = raw[part].bias;
            else
                round_to(keep ? 0.0f : MASK_BIAS || a.scale > 0 ? -infinity() : infinity(), place);
            const unsigned word = __ballot_sync(ALL_LANES, keep);
            if (lane() == 0) kept.word[part] = word;
            ours |= keep << part;
        }
        return ours;
    }

    // Makes zeros of the lane's keys that are dropped, which must not be seen (rule EVO-4).
    __device__ static void clear(unsigned kept, Boxes<BLOCK> &k, Boxes<BLOCK> &v) {
#pragma unroll
        for (int part = 0; part < BLOCK / 32; ++part)
            if ((kept >> part & 1) == 0) k.clear(lane() + 32 * part), v.clear(lane() + 32 * part);
    }
};

// --- The warps that copy ---------------------------------------------------------------------------

__device__ inline int copier() { return static_cast<int>(threadIdx.x) - MULTIPLYING; }

// What the warp has written is there, and products find it.
__device__ inline void is_told(Signal *there) {
    shared_for_warpgroups();
    __syncwarp();
    if (lane() == 0) arrive(there);
}

// Of each stage: one fetches; so many warps tell, and so many arrive when they are done with it.
template <class Shared>
__device__ inline void expect_stages(Shared &shared, int telling, int done) {
    for (int i = 0; i < STAGES; ++i)
        expect(&shared.fetched[i], 1), expect(&shared.there[i], telling), expect(&shared.done[i], done);
}

// One thread fetches; of the other three warps as many tell as there are rows s, each of some of them.
template <int MANY>
struct Telling {
    static constexpr int TELLERS = MANY < 3 ? MANY : 3, EACH = (MANY + TELLERS - 1) / TELLERS;

    // The warp's rows s of the block: of those with a number below EACH some may not be there.
    __device__ static int row(int i) { return copier() / 32 - 1 + TELLERS * i; }
    __device__ static bool is_one() { return copier() >= 32 && copier() < 32 * (1 + TELLERS); }
};

// Where keys stream by, as tiles k and v of MANY rows s and one of the pair bias for all: fetches all tiles of
// what the block does, `place`.
template <int MANY, class Given, class Shared, class Work>
__device__ inline void fetch_keys(const Given &given, Shared &shared, Turn &turn, const Work &place) {
    const int keys = static_cast<int>(given.a.K), query = static_cast<int>(place.first);
    const int b = static_cast<int>(place.at.b), s = static_cast<int>(place.at.s);
    const int h = static_cast<int>(place.at.h), g = static_cast<int>(group_of(given.a, place.at).h);
#pragma unroll 1
    for (int key = 0; key < keys; key += BLOCK, ++turn.count) {
        auto &stage = shared.stage[turn.stage()];
        Signal *fetched = &shared.fetched[turn.stage()];
        wait_for(&shared.done[turn.stage()], 1 - turn.phase());
        arrive_expecting(fetched, sizeof(stage.pair_bias) + sizeof(stage.k) + sizeof(stage.v));
        fetch_tile(stage.pair_bias, given.pair_bias, key, query, h, 0, b, fetched);
#pragma unroll 1
        for (int r = 0; r < MANY; ++r) {
            fetch_rows(stage.k[r], given.k, key, g, s + r, b, fetched);
            fetch_rows(stage.v[r], given.v, key, g, s + r, b, fetched);
        }
    }
}

// And what the warp tells of them.
template <int MANY>
struct KeysOfRows {
    using Part = Telling<MANY>;

    LaneKeys keys[Part::EACH];

    template <class Work>
    __device__ void start(const EvoformerArguments &a, const Work &place) {
#pragma unroll
        for (int i = 0; i < Part::EACH; ++i) {
            const int r = Part::row(i);
            keys[i].start(a, place.row(r), r < MANY && place.at.s + r < a.S);
            keys[i].read(a);
        }
    }

    // Tells of all tiles, and makes zeros of keys that are dropped.
    template <class Shared>
    __device__ void tell(const EvoformerArguments &a, Shared &shared, Turn &turn) {
#pragma unroll 1
        for (int left = static_cast<int>(a.K); left > 0; left -= BLOCK, ++turn.count) {
            auto &stage = shared.stage[turn.stage()];
            wait_for(&shared.done[turn.stage()], 1 - turn.phase());
            unsigned kept[Part::EACH];
#pragma unroll
            for (int i = 0; i < Part::EACH; ++i) {
                const int r = Part::row(i);
                if (r >= MANY) break;
                kept[i] = keys[i].tell(a, stage.mask[r], shared.kept[turn.stage()][r]);
                keys[i].read(a);
            }
            wait_for(&shared.fetched[turn.stage()], turn.phase());
#pragma unroll
            for (int i = 0; i < Part::EACH; ++i) {
                const int r = Part::row(i);
                if (r >= MANY) break;
                LaneKeys::clear(kept[i], stage.k[r], stage.v[r]);
            }
            is_told(&shared.there[turn.stage()]);
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
