// One block of CUDA threads, run on one processor thread.
//
// The threads of a block are fibers. The scheduler goes over them again and again, in forward, in
// reverse or in a shuffled order, and lets each run until it waits for others: at a barrier of the
// block, at an operation of its warp, or for a signal. Between two waits a thread runs alone, so a barrier that is
// missing shows as a result that depends on the order.
//
// What CUDA leaves undefined and hardware lets pass is an error here, which names where the threads
// are: a barrier that some threads skip or that different calls make up, a thread that returns while
// others wait for it, a lane read by a shuffle that does not take part.
//
// Compiled once, and linked to each variant of a kernel, which has a block of its own by that.
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <link.h>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "fiber.h"

namespace isoform::emulate {

constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_DYNAMIC_SHARED = 227 << 10;
constexpr int POISON = 0xff;  // repeated, it is NaN in every floating format, and -1

static bool operator==(const Site& a, const Site& b) {
    const auto same = [](const char* x, const char* y) { return x == y || std::strcmp(x, y) == 0; };
    return a.line == b.line && same(a.operation, b.operation) && same(a.file, b.file);
}

enum class State : unsigned char { ready, at_barrier, at_warp_operation, at_signal, returned };

// A copy of 16 bytes by cp.async that the thread has not waited for yet.
struct PendingCopy {
    unsigned char* target;
    const void* source;  // null for zeros
    unsigned group;
};

// A tile that nobody has waited for yet.
struct PendingTile {
    unsigned char* target;
    TileMap map;
    int at[5];
};

struct Task : Thread {
    Fiber fiber;
    State state = State::ready;
    Site site{};
    unsigned mask = 0;
    int predicate = 0;
    const Signal* signal = nullptr;
    unsigned copy_groups = 0;
    std::vector<PendingCopy> copies;
};

struct Progress {
    unsigned threads = 0, waiting = 0, returned = 0;
    const Task* first_waiting = nullptr;
    int predicates = 0;
    void (*kernel)(const void*) = nullptr;
    const void* arguments = nullptr;
    bool failed = false;
    std::string message;
};

Place block;
Thread* current;

static Task tasks[MAX_THREADS];
static Warp warps[MAX_THREADS / WARP];
static Progress progress;

static Task& running() {
    return static_cast<Task&>(*current);
}

static std::string formatted(const char* format, ...) __attribute__((format(printf, 1, 2)));
static std::string formatted(const char* format, ...) {
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof text, format, values);
    va_end(values);
    return text;
}

static std::string described(const Site& site) {
    return formatted("%s (%s:%d)", site.operation, site.file, site.line);
}

static std::string described(const Thread& thread) {
    return formatted("thread (%u, %u, %u)", thread.index.x, thread.index.y, thread.index.z);
}

// Give up the launch. Called on a fiber, it does not return.
static void fail(const std::string& message) {
    progress.failed = true;
    progress.message =
        formatted("block (%u, %u, %u): ", block.index.x, block.index.y, block.index.z) + message;
    if (current != nullptr) {
        suspend(running().fiber);
    }
}

static void wait(State state) {
    running().state = state;
    suspend(running().fiber);
}

int barrier(const Site& site, int predicate) {
    Task& self = running();
    self.site = site;
    self.predicate = predicate != 0;
    for (unsigned i = 0; progress.returned > 0 && i < progress.threads; ++i) {
        if (tasks[i].state == State::returned) {
            fail(described(self) + " waits at " + described(site) + ", but " +
                 described(tasks[i]) +
                 " has returned: every thread of a block must reach a barrier");
        }
    }
    if (progress.waiting == 0) {
        progress.first_waiting = &self;
    } else if (!(progress.first_waiting->site == site)) {
        const Task& other = *progress.first_waiting;
        fail(described(self) + " waits at " + described(site) + ", but " + described(other) +
             " at " + described(other.site) +
             ": all threads of a block must meet at the same barrier");
    }
    if (++progress.waiting < progress.threads) {
        wait(State::at_barrier);
        return progress.predicates;
    }
    progress.waiting = 0;
    progress.predicates = 0;
    for (unsigned i = 0; i < progress.threads; ++i) {
        progress.predicates += tasks[i].predicate;
        tasks[i].state = State::ready;
    }
    return progress.predicates;
}

unsigned arrive(const Site& site, unsigned mask) {
    Task& self = running();
    const Warp& warp = *self.warp;
    if (warp.lanes < WARP) {
        mask &= (1u << warp.lanes) - 1;  // the last warp of a block may be short
    }
    self.site = site;
    self.mask = mask;
    if ((mask >> self.lane & 1) == 0) {
        fail(described(self) + " calls " + described(site) + " with a mask without its own lane");
    }
    bool complete = true;
    for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        const Task& other = tasks[warp.first + lane];
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
    return complete ? mask : 0;
}

void wait_for_warp() {
    wait(State::at_warp_operation);
}

void let_go(unsigned mask) {
    const Warp& warp = *current->warp;
    for (unsigned lane = 0; lane < warp.lanes; ++lane) {
        if (mask >> lane & 1) {
            tasks[warp.first + lane].state = State::ready;
        }
    }
}

void require_lane(unsigned taking_part, unsigned lane, int source) {
    if ((taking_part >> source & 1) == 0) {
        fail(formatted("lane %u reads lane %d in ", lane, source) + described(running().site) +
             ", which does not take part");
    }
}

void require_alignment(const Site& site, const void* address) {
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) {
        fail(described(*current) + ": an address at " + described(site) +
             " is no multiple of 16 bytes");
    }
}

// What a signal's phase has to wait for besides arrivals, if anything.
struct Fetching {
    const Signal* signal;
    std::int64_t bytes;  // that are expected, and have not arrived
    std::vector<PendingTile> tiles;
};

static std::vector<Fetching> fetchings;

static Fetching& fetching_of(const Signal& signal) {
    for (Fetching& one : fetchings) {
        if (one.signal == &signal) {
            return one;
        }
    }
    fetchings.push_back({&signal, 0, {}});
    return fetchings.back();
}

// Those who wait are to look again.
static void wake(const Signal& signal) {
    for (unsigned i = 0; i < progress.threads; ++i) {
        if (tasks[i].state == State::at_signal && tasks[i].signal == &signal) {
            tasks[i].state = State::ready;
        }
    }
}

static void end_phase_if_over(Signal& signal) {
    if (signal.lacking == 0 && fetching_of(signal).bytes == 0) {
        signal.lacking = signal.expected;
        ++signal.phase;
        wake(signal);
    }
}

void arrive_at(const Site& site, Signal& signal) {
    if (signal.lacking == 0 || signal.lacking > signal.expected || signal.expected > MAX_THREADS) {
        fail(described(*current) + " arrives at " + described(site) + ", where nobody is expected");
    }
    --signal.lacking;
    end_phase_if_over(signal);
}

// Copy a box of an array, with zeros where there is nothing; and say how many bytes it has.
static std::int64_t fetch(const PendingTile& tile) {
    const TileMap& map = tile.map;
    const auto there = [&](unsigned axis, std::int64_t at) { return at >= 0 && at < map.sizes[axis]; };
    std::int64_t start = 0;
    bool any = true;
    for (unsigned axis = 2; axis < 5; ++axis) {
        any = any && there(axis, tile.at[axis]);
        start += tile.at[axis] * map.steps[axis - 1];
    }
    for (std::uint32_t row = 0; row < map.box[1]; ++row) {
        const std::int64_t y = tile.at[1] + std::int64_t{row};
        const std::uint32_t swizzle = map.box[0] == 64 ? row % 8 : row / 4 % 2;
        for (std::uint32_t piece = 0; piece < map.box[0] / 8; ++piece) {
            unsigned char* target = tile.target + 2 * row * map.box[0] + 16 * (piece ^ swizzle);
            std::memset(target, 0, 16);
            const std::int64_t x = tile.at[0] + std::int64_t{8 * piece}, end = map.sizes[0];
            if (any && there(1, y) && there(0, x)) {
                const std::uint64_t source = map.address + start + y * map.steps[0] + 2 * x;
                std::memcpy(target, reinterpret_cast<const void*>(source), x + 8 > end ? 2 * (end - x) : 16);
            }
        }
    }
    return std::int64_t{2} * map.box[0] * map.box[1];
}

void wait_at(const Site& site, Signal& signal, unsigned phase) {
    running().site = site;
    while (signal.phase % 2 == phase) {
        Fetching& fetching = fetching_of(signal);
        for (const PendingTile& tile : fetching.tiles) {
            fetching.bytes -= fetch(tile);
        }
        fetching.tiles.clear();
        end_phase_if_over(signal);
        if (signal.phase % 2 == phase) {
            running().signal = &signal;
            wait(State::at_signal);
        }
    }
}

void expect_bytes(Signal& signal, std::uint32_t bytes) {
    fetching_of(signal).bytes += bytes;
}

void fetch_later(const Site& site, void* target, const TileMap& map, const int (&at)[5], Signal& signal) {
    const std::uintptr_t alignment = map.box[0] == 64 ? 1024 : 256;  // after which swizzling repeats
    if (reinterpret_cast<std::uintptr_t>(target) % alignment != 0) {
        fail(described(*current) + formatted(": a tile that is no multiple of %d bytes from the start of "
                                             "shared memory is fetched at ", static_cast<int>(alignment)) +
             described(site));
    }
    PendingTile tile{static_cast<unsigned char*>(target), map, {}};
    std::memcpy(tile.at, at, sizeof at);
    fetching_of(signal).tiles.push_back(tile);
    wake(signal);
}

void copy_later(void* target, const void* source) {
    Task& self = running();
    self.copies.push_back({static_cast<unsigned char*>(target), source, self.copy_groups});
}

void close_group() {
    ++running().copy_groups;
}

void wait_for_copies(unsigned pending) {
    Task& self = running();
    std::vector<PendingCopy> later;
    for (const PendingCopy& copy : self.copies) {
        if (copy.group + pending >= self.copy_groups) {
            later.push_back(copy);
        } else if (copy.source != nullptr) {
            std::memcpy(copy.target, copy.source, 16);
        } else {
            std::memset(copy.target, 0, 16);
        }
    }
    self.copies.swap(later);
}

// What a fiber does, from the kernel's first line to its return.
static void run_thread() {
    entered(running().fiber);
    progress.kernel(progress.arguments);
    Task& self = running();
    self.state = State::returned;
    ++progress.returned;
    if (progress.waiting > 0) {
        fail(described(self) + " has returned, but " + described(*progress.first_waiting) +
             " waits at " + described(progress.first_waiting->site) +
             ": every thread of a block must reach a barrier");
    }
    for (unsigned lane = 0; lane < self.warp->lanes; ++lane) {
        const Task& other = tasks[self.warp->first + lane];
        if (other.state == State::at_warp_operation && (other.mask >> self.lane & 1)) {
            fail(described(self) + " has returned, but " + described(other) +
                 " waits for it at " + described(other.site));
        }
    }
    suspend(self.fiber);
    std::abort();  // nobody resumes a thread that has returned
}

// Nobody can go on: say who waits where.
static void report_deadlock() {
    std::map<std::string, unsigned> places;
    for (unsigned i = 0; i < progress.threads; ++i) {
        const Task& thread = tasks[i];
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
extern "C" __attribute__((visibility("hidden"))) thread_local unsigned char isoform_dynamic_shared[];

struct Piece {
    unsigned char* start;
    std::size_t bytes;
};

static int find_static_shared(dl_phdr_info* object, std::size_t, void* found) {
    const auto here = reinterpret_cast<std::uintptr_t>(&tasks);
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
static void poison_shared(const Piece& shared, std::size_t dynamic_bytes) {
    unsigned char* dynamic = isoform_dynamic_shared;
    unsigned char* unused = dynamic + dynamic_bytes;
    unsigned char* behind = dynamic + MAX_DYNAMIC_SHARED;
    std::memset(shared.start, POISON, unused - shared.start);
    std::memset(behind, POISON, shared.start + shared.bytes - behind);
#if defined(ISOFORM_ADDRESS_SANITIZER)
    ASAN_POISON_MEMORY_REGION(unused, MAX_DYNAMIC_SHARED - dynamic_bytes);
#endif
}

static void run_block(Turns& turns) {
    progress.waiting = progress.returned = 0;
    fetchings.clear();
    for (unsigned i = 0; i < progress.threads; ++i) {
        Task& thread = tasks[i];
        const dim3& size = block.block_size;
        thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
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
    while (progress.returned < progress.threads && !progress.failed) {
        bool any = false;
        turns.shuffle();
        for (const std::uint64_t turn : turns.turns) {
            if (tasks[turn].state == State::ready) {
                any = true;
                current = &tasks[turn];
                resume(tasks[turn].fiber);
                current = nullptr;
                if (progress.failed) {
                    return;
                }
            }
        }
        if (!any) {
            report_deadlock();
        }
    }
}

// Takes back the stacks of a launch, however it ends.
struct Stacks {
    ~Stacks() {
        for (Task& task : tasks) {
            take_stack(task.fiber);
        }
    }
};

// Run a grid, block after block.
static void run_grid(void (*kernel)(const void*), const void* arguments, dim3 grid, dim3 threads,
                     std::size_t dynamic_bytes, std::int64_t order) {
    block.grid_size = grid;
    block.block_size = threads;
    progress.threads = threads.x * threads.y * threads.z;
    progress.kernel = kernel;
    progress.arguments = arguments;
    progress.failed = false;
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
    Turns turns(order, progress.threads);
    for (const std::uint64_t turn : blocks.turns) {
        block.index = {static_cast<unsigned>(turn % grid.x),
                       static_cast<unsigned>(turn / grid.x % grid.y),
                       static_cast<unsigned>(turn / grid.x / grid.y)};
        poison_shared(shared, dynamic_bytes);
        run_block(turns);
        if (progress.failed) {
            return;
        }
    }
}

static std::string launched(const Kernel* kernels, std::size_t count, const char* name,
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
            return progress.failed ? std::string(name) + ": " + progress.message : "";
        }
    }
    return formatted("no kernel %s", name);
}

const char* launch(const Kernel* kernels, std::size_t count, const char* name,
                   const unsigned* grid, const unsigned* threads, const void* arguments,
                   std::size_t bytes, std::size_t dynamic_bytes, std::int64_t order) {
    static std::string message;
    message = launched(kernels, count, name, grid, threads, arguments, bytes, dynamic_bytes, order);
    return message.c_str();
}

}  // namespace isoform::emulate
