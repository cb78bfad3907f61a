// One block of CUDA threads, run on one processor thread.
//
// The threads of a block are fibers. The scheduler goes over them again and again, in forward, in
// reverse or in a shuffled order, and lets each run until it waits for others: at a barrier of the
// block, or at an operation of its warp. Between two waits a thread runs alone, so a barrier that is
// missing shows as a result that depends on the order.
//
// What CUDA leaves undefined and hardware lets pass is an error here, which names where the threads
// are: a barrier that some threads skip or that different calls make up, a thread that returns while
// others wait for it, a lane read by a shuffle that does not take part.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <link.h>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"
#include "vector_types.h"

namespace isoform::emulate {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_DYNAMIC_SHARED = 227 << 10;
constexpr int POISON = 0xff;  // repeated, it is NaN in every floating format, and -1

// Where in the kernel's source a thread waits.
struct Site {
    const char* operation;
    const char* file;
    int line;
};

inline bool operator==(const Site& a, const Site& b) {
    const auto same = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
    return a.line == b.line && same(a.operation, b.operation) && same(a.file, b.file);
}

enum class State : unsigned char { ready, at_barrier, at_warp_operation, returned };

// A copy of 16 bytes by cp.async that the thread has not waited for yet.
struct PendingCopy {
    unsigned char* target;
    const void* source;  // null for zeros
    unsigned group;
};

struct Warp {
    alignas(64) unsigned char inputs[WARP][64];
    alignas(64) unsigned char outputs[WARP][64];
    unsigned first = 0, lanes = 0;
};

struct Thread {
    Fiber fiber;
    uint3 index{};
    unsigned number = 0, lane = 0;
    Warp* warp = nullptr;
    State state = State::ready;
    Site site{};
    unsigned mask = 0;
    int predicate = 0;
    unsigned copy_groups = 0;
    std::vector<PendingCopy> copies;
};

struct Block {
    dim3 grid_size, block_size;
    uint3 index{};
    unsigned threads = 0, waiting = 0, returned = 0;
    const Thread* first_waiting = nullptr;
    int predicates = 0;
    void (*kernel)(const void*) = nullptr;
    const void* arguments = nullptr;
    bool failed = false;
    std::string message;
};

static Thread threads[MAX_THREADS];
static Warp warps[MAX_THREADS / WARP];
static Block block;
static Thread* current;

inline std::string formatted(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string formatted(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof text, format, values);
    va_end(values);
    return text;
}

inline std::string described(const Site& site) {
    return formatted("%s (%s:%d)", site.operation, site.file, site.line);
}

inline std::string described(const Thread& thread) {
    return formatted("thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
}

// Give up the launch. Called on a fiber, it does not return.
inline void fail(const std::string& message) {
    block.failed = true;
    block.message =
        formatted("block (%u, %u, %u): ", block.index.x, block.index.y, block.index.z) + message;
    if (current != nullptr) {
        suspend(current->fiber);
    }
}

inline void wait(State state) {
    current->state = state;
    suspend(current->fiber);
}

// A barrier of the block, which also counts the threads whose predicate holds.
inline int barrier(const Site& site, int predicate) {
    Thread& self = *current;
    self.site = site;
    self.predicate = predicate != 0;
    for (unsigned i = 0; block.returned > 0 && i < block.threads; ++i) {
        if (threads[i].state == State::returned) {
            fail(described(self) + " waits at " + described(site) + ", but " +
                 described(threads[i]) +
                 " has returned: every thread of a block must reach a barrier");
        }
    }
    if (block.waiting == 0) {
        block.first_waiting = &self;
    } else if (!(block.first_waiting->site == site)) {
        const Thread& other = *block.first_waiting;
        fail(described(self) + " waits at " + described(site) + ", but " + described(other) +
             " at " + described(other.site) +
             ": all threads of a block must meet at the same barrier");
    }
    if (++block.waiting < block.threads) {
        wait(State::at_barrier);
        return block.predicates;
    }
    block.waiting = 0;
    block.predicates = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
        block.predicates += threads[i].predicate;
        threads[i].state = State::ready;
    }
    return block.predicates;
}

// An operation of the lanes in `mask`. The last of them to arrive does it for all: `combine` maps
// the lanes' inputs to their outputs.
template <class Out, class In, class Combine>
Out warp_operation(const Site& site, unsigned mask, const In& input, Combine combine) {
    static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "a lane's slot holds 64 bytes");
    static_assert(std::is_trivially_copyable_v<In> && std::is_trivially_copyable_v<Out>,
                  "what lanes exchange is copied byte by byte");
    Thread& self = *current;
    Warp& warp = *self.warp;
    if (warp.lanes < WARP) {
        mask &= (1u << warp.lanes) - 1;  // the last warp of a block may be short
    }
    self.site = site;
    self.mask = mask;
    std::memcpy(warp.inputs[self.lane], &input, sizeof input);
    if ((mask >> self.lane & 1) == 0) {
        fail(described(self) + " calls " + described(site) + " with a mask without its own lane");
    }
    bool complete = true;
    for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        const Thread& other = threads[warp.first + lane];
        if ((mask >> lane & 1) == 0 || &other == &self) {
            continue;
        }
        if (other.state == State::returned) {
            fail(described(self) + " waits at " + described(site) + " for " + described(other) +
                 ", which has returned");
        }
        if (other.state != State::at_warp_operation) {
            complete = false;
        } else if (!(other.site == site) || other.mask != mask) {
            fail(described(self) + " waits at " + described(site) +
                 formatted(" with mask %#010x, but ", mask) + described(other) + " at " +
                 described(other.site) + formatted(" with mask %#010x", other.mask));
        }
    }
    if (complete) {
        In inputs[WARP];
        Out outputs[WARP];
        for (unsigned lane = 0; lane < warp.lanes; ++lane) {
            std::memcpy(static_cast<void*>(&inputs[lane]), warp.inputs[lane], sizeof(In));
        }
        combine(mask, static_cast<const In*>(inputs), static_cast<Out*>(outputs));
        for (unsigned lane = 0; lane < warp.lanes; ++lane) {
            if (mask >> lane & 1) {
                std::memcpy(warp.outputs[lane], &outputs[lane], sizeof(Out));
                threads[warp.first + lane].state = State::ready;
            }
        }
    } else {
        wait(State::at_warp_operation);
    }
    Out result;
    std::memcpy(static_cast<void*>(&result), warp.outputs[self.lane], sizeof result);
    return result;
}

// What a fiber does, from the kernel's first line to its return.
inline void run_thread() {
    entered(current->fiber);
    block.kernel(block.arguments);
    Thread& self = *current;
    self.state = State::returned;
    ++block.returned;
    if (block.waiting > 0) {
        fail(described(self) + " has returned, but " + described(*block.first_waiting) +
             " waits at " + described(block.first_waiting->site) +
             ": every thread of a block must reach a barrier");
    }
    for (unsigned lane = 0; lane < self.warp->lanes; ++lane) {
        const Thread& other = threads[self.warp->first + lane];
        if (other.state == State::at_warp_operation && (other.mask >> self.lane & 1)) {
            fail(described(self) + " has returned, but " + described(other) +
                 " waits for it at " + described(other.site));
        }
    }
    suspend(self.fiber);
    std::abort();  // nobody resumes a thread that has returned
}

// Nobody can go on: say who waits where.
inline void report_deadlock() {
    std::map<std::string, unsigned> places;
    for (unsigned i = 0; i < block.threads; ++i) {
        const Thread& thread = threads[i];
        ++places[thread.state == State::returned ? "have returned"
                                                 : "wait at " + described(thread.site)];
    }
    std::string message = "the threads wait for each other:";
    for (const auto& [place, count] : places) {
        message += formatted(" %u ", count) + place + ",";
    }
    message.back() = '.';
    fail(message);
}

// The orders in which threads, and blocks, take turns. Any number from 0 up seeds a shuffle.
constexpr std::int64_t FORWARD = -1, REVERSE = -2;

struct Turns {
    std::int64_t order;
    std::uint64_t random;
    std::vector<std::uint64_t> turns;

    Turns(std::int64_t order, std::uint64_t count)
        : order(order), random(0x9e3779b97f4a7c15ull * (order + 3)), turns(count) {
        for (std::uint64_t i = 0; i < count; ++i) {
            turns[i] = order == REVERSE ? count - 1 - i : i;
        }
    }

    void shuffle() {
        for (std::uint64_t i = turns.size(); order >= 0 && i > 1; --i) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            std::swap(turns[i - 1], turns[random % i]);
        }
    }
};

// Shared memory. A `__shared__` variable is thread-local: static within a block's function, and
// found by the loader in one piece, which is how it can be filled with NaN before each block.
extern "C" thread_local unsigned char isoform_dynamic_shared[];

struct Piece {
    unsigned char* start;
    std::size_t bytes;
};

inline int find_static_shared(dl_phdr_info* object, std::size_t, void* found) {
    const auto here = reinterpret_cast<std::uintptr_t>(&threads);
    bool ours = false;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto& part = object->dlpi_phdr[i];
        const std::uintptr_t start = object->dlpi_addr + part.p_vaddr;
        ours = ours || (part.p_type == PT_LOAD && here >= start && here < start + part.p_memsz);
    }
    for (int i = 0; ours && i < object->dlpi_phnum; ++i) {
        if (object->dlpi_phdr[i].p_type == PT_TLS) {
            *static_cast<Piece*>(found) = {static_cast<unsigned char*>(object->dlpi_tls_data),
                                           object->dlpi_phdr[i].p_memsz};
        }
    }
    return ours;
}

// Fill the shared memory with NaN, and close what lies behind the dynamic part that was asked for.
inline void poison_shared(const Piece& shared, std::size_t dynamic_bytes) {
    unsigned char* dynamic = isoform_dynamic_shared;
    unsigned char* unused = dynamic + dynamic_bytes;
    unsigned char* behind = dynamic + MAX_DYNAMIC_SHARED;
    std::memset(shared.start, POISON, unused - shared.start);
    std::memset(behind, POISON, shared.start + shared.bytes - behind);
#if defined(ISOFORM_ADDRESS_SANITIZER)
    ASAN_POISON_MEMORY_REGION(unused, MAX_DYNAMIC_SHARED - dynamic_bytes);
#endif
}

inline void run_block(Turns& turns) {
    block.waiting = block.returned = 0;
    for (unsigned i = 0; i < block.threads; ++i) {
        Thread& thread = threads[i];
        const dim3& size = block.block_size;
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        thread.number = i;
        thread.lane = i % WARP;
        thread.warp = &warps[i / WARP];
        thread.warp->first = i - thread.lane;
        thread.warp->lanes = thread.lane + 1;
        thread.state = State::ready;
        thread.copy_groups = 0;
        thread.copies.clear();
        if (!prepare(thread.fiber, run_thread, i)) {
            fail(described(thread) + " has no stack: the process has no memory, or no maps, left");
            return;
        }
    }
    while (block.returned < block.threads && !block.failed) {
        bool progress = false;
        turns.shuffle();
        for (const std::uint64_t turn : turns.turns) {
            if (threads[turn].state == State::ready) {
                progress = true;
                current = &threads[turn];
                resume(current->fiber);
                current = nullptr;
                if (block.failed) {
                    return;
                }
            }
        }
        if (!progress) {
            report_deadlock();
        }
    }
}

// Takes back the stacks of a launch, however it ends.
struct Stacks {
    ~Stacks() {
        for (Thread& thread : threads) {
            take_stack(thread.fiber);
        }
    }
};

// Run a grid, block after block.
inline void run_grid(void (*kernel)(const void*), const void* arguments, dim3 grid, dim3 threads,
                     std::size_t dynamic_bytes, std::int64_t order) {
    block.grid_size = grid;
    block.block_size = threads;
    block.threads = threads.x * threads.y * threads.z;
    block.kernel = kernel;
    block.arguments = arguments;
    block.failed = false;
    const Stacks stacks;
#if defined(ISOFORM_ADDRESS_SANITIZER)
    ASAN_UNPOISON_MEMORY_REGION(isoform_dynamic_shared, MAX_DYNAMIC_SHARED);  // as the last left it
#endif
    // touched once: the loader makes the memory at its first use
    *static_cast<volatile unsigned char*>(isoform_dynamic_shared) = POISON;
    Piece shared{};
    dl_iterate_phdr(find_static_shared, &shared);
    Turns blocks(order, std::uint64_t{grid.x} * grid.y * grid.z);
    blocks.shuffle();
    Turns turns(order, block.threads);
    for (const std::uint64_t turn : blocks.turns) {
        block.index = {static_cast<unsigned>(turn % grid.x),
                       static_cast<unsigned>(turn / grid.x % grid.y),
                       static_cast<unsigned>(turn / grid.x / grid.y)};
        poison_shared(shared, dynamic_bytes);
        run_block(turns);
        if (block.failed) {
            return;
        }
    }
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

// What Python calls: an empty message where all went well.
inline std::string launch(const Kernel* kernels, std::size_t count, const char* name,
                          const unsigned* grid, const unsigned* threads, const void* arguments,
                          std::size_t bytes, std::size_t dynamic_bytes, std::int64_t order) {
    const dim3 size{threads[0], threads[1], threads[2]};
    if (std::uint64_t{size.x} * size.y * size.z > MAX_THREADS) {
        return formatted("a block has %u threads at most", MAX_THREADS);
    }
    if (dynamic_bytes > MAX_DYNAMIC_SHARED) {
        return formatted("%zu bytes of shared memory: a block has %zu at most", dynamic_bytes,
                         MAX_DYNAMIC_SHARED);
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (std::strcmp(kernels[i].name, name) == 0) {
            if (kernels[i].bytes != bytes) {
                return formatted("%s takes %zu bytes of arguments, got %zu", name,
                                 kernels[i].bytes, bytes);
            }
            run_grid(kernels[i].call, arguments, {grid[0], grid[1], grid[2]}, size, dynamic_bytes,
                     order);
            return block.failed ? std::string(name) + ": " + block.message : "";
        }
    }
    return formatted("no kernel %s", name);
}

}  // namespace isoform::emulate
