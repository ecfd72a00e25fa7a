#include "tile_linear.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <map>

#include "scratch.h"
#include "shares.h"

#define VITFAST_WITH_AMX
#define VITFAST_KERNEL "tile_linear_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
#ifdef VITFAST_WITH_AMX
namespace {

// The left operand's rows that stay in L2 while the right one's blocks pass: 224 rows of 2304 bf16 take 1 MiB, of 768
// fp32 numbers as well.
constexpr int64_t kMostUnits = 7;   // of kTileLines rows
constexpr int64_t kMostSteps = 72;  // of kTileNumbers bf16 numbers; more are summed up in turns

struct Work {
    int64_t blocks, parts;  // an item is one of `blocks` blocks of rows and of `parts` parts of the right blocks
};

// The fewest items that keep the threads equally busy; packing a unit of rows takes as long as one product of it.
Work find_work(int64_t units, int64_t columns, int64_t threads) {
    constexpr int64_t kMoreBlocks = 8, kFewThreads = 8;
    constexpr double kPacking = 1;
    Work best{1, 1};
    double best_time = std::numeric_limits<double>::infinity();
    const int64_t most_parts = std::min(columns, std::max(kFewThreads, threads));
    const int64_t fewest = (units + kMostUnits - 1) / kMostUnits;
    for (int64_t parts = 1; parts <= most_parts; ++parts) {
        for (int64_t blocks = fewest; blocks <= std::min(units, fewest + kMoreBlocks); ++blocks) {
            const int64_t items = blocks * parts;
            double time = 0;
            for (int64_t t = 0; t < threads; ++t) {
                double busy = 0;
                for (int64_t i = items * t / threads; i < items * (t + 1) / threads; ++i) {
                    const int64_t block = i / parts, part = i % parts;
                    const int64_t height = units * (block + 1) / blocks - units * block / blocks;
                    busy += height * (kPacking + columns * (part + 1) / parts - columns * part / parts);
                }
                time = std::max(time, busy);
            }
            if (time < 0.99 * best_time) {
                best = {blocks, parts};
                best_time = time;
            }
        }
    }
    return best;
}

// The same, found once for each shape: the search takes as long as a small product.
Work split_work(int64_t units, int64_t columns, int64_t threads) {
    constexpr size_t kMostKept = 256;
    thread_local std::map<std::array<int64_t, 3>, Work> found;
    const std::array<int64_t, 3> shape{units, columns, threads};
    const auto known = found.find(shape);
    if (known != found.end()) return known->second;
    if (found.size() >= kMostKept) found.clear();
    return found[shape] = find_work(units, columns, threads);
}

}  // namespace

template <class Y>
void pack_tiles(const RightOperand<Y>& right, uint32_t* packed) {
    torch::stable::parallel_for(0, tile_blocks(right.outputs), 1, [&](int64_t begin, int64_t end) {
        VITFAST_AMX_TILES::pack_right(right, begin, end, packed);
    });
}

template <class P>
const uint32_t* left_in_tiles(const P& args) {
    if constexpr (std::is_same_v<typename P::Number, bf16>) return reinterpret_cast<const uint32_t*>(args.in_tiles.x);
    return nullptr;
}

template <class P>
void multiply_by_tiles(const P& args, const uint32_t* packed) {
    using Number = typename P::Number;
    if (args.rows == 0 || args.outputs == 0) return;
    const int64_t units = tile_blocks(args.rows), blocks = tile_blocks(args.outputs),
                  steps = tile_steps<Number>(args.inputs);
    const int64_t most = kMostSteps / kTileParts<Number>, turns = std::max<int64_t>(1, (steps + most - 1) / most);
    const Work work = split_work(units, blocks, torch::stable::get_num_threads());
    const int64_t items = work.blocks * work.parts;
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
    const int64_t most_units = (units + work.blocks - 1) / work.blocks, most_steps = (steps + turns - 1) / turns;
    const int64_t most_blocks = (blocks + work.parts - 1) / work.parts;
    const uint32_t* const whole_left = left_in_tiles(args);
    Shares shares(items, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
        const int64_t left_words = whole_left ? 0 : most_units * most_steps * kTileStep<Number>;
        const int64_t sums_words = (turns == 1 ? most_units + 1 : most_units * most_blocks) * kTileLines * kTileLines;
        Scratch scratch(left_words + sums_words);
        uint32_t* const left = scratch.take<uint32_t>(left_words);
        auto* const sums = scratch.take<typename P::Sum>(sums_words);
        int64_t packed_block = -1;
        for (int64_t i; shares.take(thread, &i);) {
            const int64_t block = i / work.parts, part = i % work.parts;
            const int64_t begin = units * block / work.blocks * kTileLines;
            const int64_t end = std::min(args.rows, units * (block + 1) / work.blocks * kTileLines);
            const int64_t first = blocks * part / work.parts, last = blocks * (part + 1) / work.parts;
            for (int64_t turn = 0; turn < turns; ++turn) {
                const int64_t from = steps * turn / turns, to = steps * (turn + 1) / turns;
                if (!whole_left && (turns > 1 || packed_block != block)) {
                    VITFAST_AMX_TILES::pack_left(args, begin, end, from, to, left);
                }
                const uint32_t* rows_left = left;
                if (whole_left) rows_left = whole_left + (begin / kTileLines * steps + from) * kTileStep<Number>;
                const int64_t pitch = whole_left ? steps : to - from;
                VITFAST_AMX_TILES::multiply_rows_by_tiles(args, rows_left, pitch, packed, begin, end, first, last, from,
                                                          to, sums);
            }
            packed_block = block;
        }
    });
}

template <class X, class Y>
void multiply_by_tiles(const Product<X, Y>& args, const RightOperand<Y>& right) {
    if (right.packed) return multiply_by_tiles(args, right.packed);
    const int64_t words = tile_words<Y>(args.inputs, args.outputs);
    Scratch scratch(words);
    uint32_t* const packed = scratch.take<uint32_t>(words);
    pack_tiles(right, packed);
    multiply_by_tiles(args, packed);
}
#else
template <class Y>
void pack_tiles(const RightOperand<Y>&, uint32_t*) {}

template <class P>
void multiply_by_tiles(const P&, const uint32_t*) {}

template <class X, class Y>
void multiply_by_tiles(const Product<X, Y>&, const RightOperand<Y>&) {}
#endif

template void pack_tiles(const RightOperand<float>&, uint32_t*);
template void pack_tiles(const RightOperand<bf16>&, uint32_t*);
template void multiply_by_tiles(const Product<float, float>&, const RightOperand<float>&);
template void multiply_by_tiles(const Product<float, bf16>&, const RightOperand<bf16>&);
template void multiply_by_tiles(const Product<bf16, bf16>&, const RightOperand<bf16>&);
template void multiply_by_tiles(const Int8Product<float>&, const uint32_t*);
template void multiply_by_tiles(const Int8Product<bf16>&, const uint32_t*);

}  // namespace vitfast
