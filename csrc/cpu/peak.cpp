#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#define VITFAST_WITH_AMX
#define VITFAST_WITH_VNNI
#include "isa.h"

// The chip's own limit: multiply-adds a second with nothing to load or store, on all of PyTorch's threads.
namespace vitfast {

enum class PeakDtype { kFloat32, kBFloat16, kInt8 };

constexpr int64_t kPeakBytes = 1024;  // 14 registers of 64 bytes, or a tile

}  // namespace vitfast

#define VITFAST_KERNEL "peak_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kDtypes[] = {"float32", "bfloat16", "int8"};
constexpr double kMostSeconds = 60;

PeakDtype dtype_of(const std::string& name) {
    for (int i = 0; i < 3; ++i) {
        if (name == kDtypes[i]) return static_cast<PeakDtype>(i);
    }
    fail("dtype is \"", name, "\"; allowed: ", show(kDtypes));
}

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct Measured {
    int64_t operations = 0;
    double seconds = 0;
};

// One thread's share: until `seconds` after the start of all.
Measured run_until(PeakDtype dtype, Clock::time_point start, double seconds) {
    // 0.00781 in both halves of each word: as bf16 and fp32 a number whose sums grow slowly, and small integers
    alignas(64) uint16_t data[kPeakBytes / 2];
    std::fill(std::begin(data), std::end(data), uint16_t{0x3c00});
    Measured mine;
    while (mine.seconds < seconds) {
        VITFAST_DISPATCH(multiply_add(dtype, data, &mine.operations));
        mine.seconds = since(start);
    }
    return mine;
}

// Operations a second (a multiply-add is two) of all threads together, over about `seconds`.
double multiply_add_rate(std::string dtype, double seconds) {
    const PeakDtype kind = dtype_of(dtype);
    if (!(seconds > 0 && seconds <= kMostSeconds))
        fail("seconds is ", seconds, "; allowed: over 0 up to ", kMostSeconds);
    const int64_t threads = torch::stable::get_num_threads();
    std::vector<Measured> measured(threads);
    const Clock::time_point start = Clock::now();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) measured[thread] = run_until(kind, start, seconds);
    });
    Measured all;
    for (const Measured& one : measured) {
        all.operations += one.operations;
        all.seconds = std::max(all.seconds, one.seconds);
    }
    return all.operations / all.seconds;
}

}  // namespace
}  // namespace vitfast

// No tensor arguments, so no device decides: for all of them.
STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CompositeExplicitAutograd, m) {
    m.impl("multiply_add_rate", TORCH_BOX(&vitfast::multiply_add_rate));
}
