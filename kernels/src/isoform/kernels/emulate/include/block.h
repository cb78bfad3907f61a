// One block of CUDA threads as its kernel sees it: what the headers that stand for CUDA's are made of.
//
// What runs the threads is runtime.cpp, which all variants of all kernels share. Little is included
// here and little is defined, since it is read again for each of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_types.h"

#pragma GCC visibility push(hidden)  // a library has one block, which is nobody else's

namespace isoform::emulate {

constexpr unsigned WARP = 32;

// Where in the kernel's source a thread waits.
struct Site {
    const char* operation;
    const char* file;
    int line;
};

struct Warp {
    alignas(64) unsigned char inputs[WARP][64];
    alignas(64) unsigned char outputs[WARP][64];
    unsigned first = 0, lanes = 0;
};

struct Thread {
    uint3 index{};
    unsigned lane = 0;
    Warp* warp = nullptr;
};

struct Place {
    dim3 grid_size, block_size;
    uint3 index{};
};

extern Place block;
extern Thread* current;

// A barrier of the block, which also counts the threads whose predicate holds.
int barrier(const Site& site, int predicate);

// The current thread is at an operation of the lanes in `mask`, of which those that exist are
// returned if it is the last to arrive, and none if it is not.
unsigned arrive(const Site& site, unsigned mask);

// Wait until the last of the lanes has arrived, and has let these go.
void wait_for_warp();
void let_go(unsigned mask);

// Faults that are found by what a lane asks for. None returns if it is one.
void require_lane(unsigned taking_part, unsigned lane, int source);
void require_alignment(const Site& site, const void* address);

// Copies of 16 bytes, of zeros where `source` is null, that arrive when the thread waits for them:
// `pending` groups at most stay under way.
void copy_later(void* target, const void* source);
void close_group();
void wait_for_copies(unsigned pending);

// In shared memory: how many arrivals end a phase, how many this one still lacks, and which it is.
struct alignas(8) Signal {
    std::uint16_t expected, lacking;
    std::uint32_t phase;
};

void arrive_at(const Site& site, Signal& signal);
void wait_at(const Site& site, Signal& signal, unsigned phase);

// How an array lies of which tiles are fetched: as `isoform.kernels.emulate.calls.tile_map` says it. Its
// elements have two bytes.
struct alignas(64) TileMap {
    std::uint64_t address;
    std::int64_t sizes[5];
    std::int64_t steps[4];  // in bytes, of all axes but the first
    std::uint32_t box[2];   // along the first two
    unsigned char unused[40];
};
static_assert(sizeof(TileMap) == 128, "calls.py has another idea of TileMap");

// A tile whose bytes the signal expects. It arrives when somebody waits for the signal.
void expect_bytes(Signal& signal, std::uint32_t bytes);
void fetch_later(const Site& site, void* target, const TileMap& map, const int (&at)[5], Signal& signal);

// An operation of the lanes in `mask`. The last of them to arrive does it for all: `combine` maps
// the lanes' inputs to their outputs.
template <class Out, class In, class Combine>
Out warp_operation(const Site& site, unsigned mask, const In& input, Combine combine) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "a lane's slot holds 64 bytes");
    static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>,
                  "what lanes exchange is copied byte by byte");
    const unsigned own = current->lane;
    Warp& warp = *current->warp;
    std::memcpy(warp.inputs[own], &input, sizeof input);
    if (const unsigned taking_part = arrive(site, mask)) {
        In inputs[WARP];
        Out outputs[WARP];
        for (unsigned lane = 0; lane < warp.lanes; ++lane) {
            std::memcpy(static_cast<void*>(&inputs[lane]), warp.inputs[lane], sizeof(In));
        }
        combine(taking_part, static_cast<const In*>(inputs), static_cast<Out*>(outputs));
        for (unsigned lane = 0; lane < warp.lanes; ++lane) {
            if (taking_part >> lane & 1) {
                std::memcpy(warp.outputs[lane], &outputs[lane], sizeof(Out));
            }
        }
        let_go(taking_part);
    } else {
        wait_for_warp();
    }
    Out result;
    std::memcpy(static_cast<void*>(&result), warp.outputs[own], sizeof result);
    return result;
}

// A kernel takes one structure by value. Its type is known here only.
template <auto kernel>
struct Entry;

template <class Arguments, void (*kernel)(Arguments)>
struct Entry<kernel> {
    static constexpr std::size_t bytes = sizeof(Arguments);

    static void call(const void* given) {
        std::remove_const_t<Arguments> arguments;
        std::memcpy(static_cast<void*>(&arguments), given, sizeof arguments);
        kernel(arguments);
    }
};

struct Kernel {
    const char* name;
    std::size_t bytes;
    void (*call)(const void*);
};

// What Python calls, by way of the program: an empty message where all went well. It lasts until the
// next launch.
const char* launch(const Kernel* kernels, std::size_t count, const char* name,
                   const unsigned* grid, const unsigned* threads, const void* arguments,
                   std::size_t bytes, std::size_t dynamic_bytes, std::int64_t order);

}  // namespace isoform::emulate

#pragma GCC visibility pop
