// Enough of CUDA to run a kernel's source on the CPU; compile with -include of this file. The threads of a block
// are coroutines that take turns at barriers and shuffles; blocks run one after the other. A barrier that not all its
// threads reach is reported, not waited for. Running threads and blocks in reverse order gives other results where a
// kernel misses a barrier or two blocks write one element.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Barrier {
    unsigned arrived = 0;
    unsigned expected = 0;
    unsigned generation = 0;
};

// A coroutine: entered the first time through makecontext, later through longjmp, which makes no system call.
struct Thread {
    ucontext_t context;
    jmp_buf resume;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;
    bool done = false;
    int shuffles = 0;

    bool can_run() const { return !done && (waits_for == nullptr || waits_for->generation != generation); }
};

struct Warp {
    Barrier barrier;
    float lane[2][kWarp];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::map<int, Barrier> barriers;
    std::function<void()> kernel;
    ucontext_t first_entry;
    jmp_buf scheduler;
    unsigned current = 0;
    std::string error;
};

static Block block;

inline void wait(Barrier& barrier, unsigned expected) {
    if (barrier.arrived > 0 && barrier.expected != expected) {
        block.error = "threads meet at one barrier with different counts";
    }
    barrier.expected = expected;
    Thread& thread = block.threads[block.current];
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    thread.waits_for = &barrier;
    thread.generation = barrier.generation;
    if (_setjmp(thread.resume) == 0) _longjmp(block.scheduler, 1);
}

// A coroutine outlives its block: making one costs a system call, and a launch may have a hundred thousand threads.
inline void thread_main() {
    for (;;) {
        block.kernel();
        Thread& thread = block.threads[block.current];
        thread.done = true;
        if (_setjmp(thread.resume) == 0) _longjmp(block.scheduler, 1);
    }
}

// Runs the current thread until it waits or ends.
inline void resume(Thread& thread) {
    if (_setjmp(block.scheduler) != 0) return;
    if (thread.started) _longjmp(thread.resume, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, thread_main, 0);
    swapcontext(&block.first_entry, &thread.context);
}

inline void run_block(unsigned count, bool reverse) {
    block.warps.assign(count / kWarp, Warp());
    block.barriers.clear();
    block.error.clear();
    if (block.threads.size() < count) block.threads = std::vector<Thread>(count);
    for (unsigned i = 0; i < count; ++i) {
        block.threads[i].waits_for = nullptr;
        block.threads[i].done = false;
        block.threads[i].shuffles = 0;
    }
    unsigned left = count;
    while (left > 0) {
        bool progress = false;
        for (unsigned i = 0; i < count; ++i) {
            // A warp that got somewhere goes first again: it runs as far ahead of the others as barriers let it.
            if (progress && i % kWarp == 0) break;
            block.current = reverse ? count - 1 - i : i;
            Thread& thread = block.threads[block.current];
            if (!thread.can_run()) continue;
            progress = true;
            threadIdx.x = block.current;
            resume(thread);
            left -= thread.done;
        }
        if (!progress) block.error = "a barrier or shuffle that not all its threads reach";
        if (!block.error.empty()) {
            const std::string error = block.error;
            block.threads.clear();  // they are stuck in the middle of a kernel
            throw std::runtime_error(error);
        }
    }
}

// What csrc/cuda/launch.h's Launcher is on the GPU.
struct Launcher {
    int processors;
    bool reverse;

    int multiprocessors() const { return processors; }

    template <typename... Params, typename... Arguments>
    void operator()(const char* name, void (*kernel)(Params...), dim3 grid, dim3 threads,
                    const Arguments&... arguments) {
        const bool bad_grid = grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z != 1;
        const bool bad_block =
            threads.x == 0 || threads.x > 1024 || threads.x % kWarp != 0 || threads.y != 1 || threads.z != 1;
        if (bad_grid || bad_block)
            throw std::runtime_error(std::string("launch of ") + name + " is out of CUDA's limits");
        gridDim = grid;
        blockDim = threads;
        block.kernel = [&] { kernel(arguments...); };
        const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y;
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t index = reverse ? blocks - 1 - i : i;
            blockIdx = dim3(index % grid.x, index / grid.x);
            try {
                run_block(threads.x, reverse);
            } catch (const std::runtime_error& error) {
                throw std::runtime_error(std::string(name) + ": " + error.what());
            }
        }
    }
};

// A float that counts how often each element of a watched array is assigned.
struct CountedFloat {
    float value;

    CountedFloat() = default;
    CountedFloat(float v) : value(v) {}
    CountedFloat(const CountedFloat&) = default;
    operator float() const { return value; }
    CountedFloat& operator=(const CountedFloat& other) {
        const CountedFloat* const begin = watched;
        if (this >= begin && this < begin + watched_count) ++counts[this - begin];
        value = other.value;
        return *this;
    }

    static inline const CountedFloat* watched = nullptr;
    static inline int64_t watched_count = 0;
    static inline int32_t* counts = nullptr;
};

}  // namespace emulator

inline void host_barrier(int id, int count) { emulator::wait(emulator::block.barriers[id], count); }

inline void __syncthreads() { host_barrier(0, blockDim.x); }

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
    emulator::Block& block = emulator::block;
    const unsigned thread = block.current;
    emulator::Warp& warp = block.warps[thread / emulator::kWarp];
    const int turn = block.threads[thread].shuffles++ % 2;
    if (mask != 0xffffffffu) block.error = "a shuffle with a partial mask";
    warp.lane[turn][thread % emulator::kWarp] = value;
    emulator::wait(warp.barrier, emulator::kWarp);
    return warp.lane[turn][(thread % emulator::kWarp) ^ offset];
}
