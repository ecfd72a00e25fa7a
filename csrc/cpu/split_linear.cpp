#include "split_linear.h"

#include <torch/csrc/stable/ops.h>

#include "scratch.h"
#include "shares.h"

#define VITFAST_WITH_AMX
#define VITFAST_KERNEL "split_linear_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
#ifdef VITFAST_WITH_AMX
namespace {

// The left operand's block that stays in L2 while the right one's panels pass: 224 rows of 768 numbers take 1 MiB.
constexpr int64_t kMostUnits = 7;   // of kSplitLines rows
constexpr int64_t kMostSteps = 24;  // of kSplitNumbers numbers; more are summed up in turns

struct Work {
    int64_t blocks, parts;  // an item is one of `blocks` blocks of rows and of `parts` parts of the panels
};

// The fewest items that keep the threads equally busy; packing a unit of rows takes as long as a panel.
Work split_work(int64_t units, int64_t panels, int64_t threads) {
    constexpr int64_t kMoreBlocks = 8, kMostParts = 8;
    constexpr double kPacking = 1;
    Work best{1, 1};
    double best_time = std::numeric_limits<double>::infinity();
    const int64_t fewest = (units + kMostUnits - 1) / kMostUnits;
    for (int64_t parts = 1; parts <= std::min(panels, kMostParts); ++parts) {
        for (int64_t blocks = fewest; blocks <= std::min(units, fewest + kMoreBlocks); ++blocks) {
            const int64_t items = blocks * parts;
            double time = 0;
            for (int64_t t = 0; t < threads; ++t) {
                double busy = 0;
                for (int64_t i = items * t / threads; i < items * (t + 1) / threads; ++i) {
                    const int64_t block = i / parts, part = i % parts;
                    const int64_t height = units * (block + 1) / blocks - units * block / blocks;
                    busy += height * (kPacking + panels * (part + 1) / parts - panels * part / parts);
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

}  // namespace

void pack_split(const RightOperand<float>& right, uint32_t* packed) {
    torch::stable::parallel_for(0, split_blocks(right.outputs), 1, [&](int64_t begin, int64_t end) {
        VITFAST_AMX_TILES::pack_split_right(right, begin, end, packed);
    });
}

void multiply_split(const Product<float, float>& args, const RightOperand<float>& right) {
    if (args.rows == 0 || args.outputs == 0) return;
    Scratch packed(right.packed ? 0 : split_words(args.inputs, args.outputs));
    const uint32_t* words = right.packed;
    if (!words) {
        uint32_t* const made = packed.take<uint32_t>(split_words(args.inputs, args.outputs));
        pack_split(right, made);
        words = made;
    }
    const int64_t units = split_blocks(args.rows), panels = split_blocks(args.outputs),
                  steps = split_steps(args.inputs);
    const Work work = split_work(units, panels, torch::stable::get_num_threads());
    const int64_t items = work.blocks * work.parts, turns = std::max<int64_t>(1, (steps + kMostSteps - 1) / kMostSteps);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
    const int64_t most_units = (units + work.blocks - 1) / work.blocks, most_steps = (steps + turns - 1) / turns;
    const int64_t most_panels = (panels + work.parts - 1) / work.parts;
    Shares shares(items, threads);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
        const int64_t left_words = most_units * most_steps * kSplitStepWords;
        const int64_t sums_words = (turns == 1 ? 2 : most_panels * most_units) * kSplitLines * kPanelColumns;
        Scratch scratch(left_words + sums_words);
        uint32_t* const left = scratch.take<uint32_t>(left_words);
        float* const sums = scratch.take<float>(sums_words);
        int64_t packed_block = -1;
        for (int64_t i; shares.take(thread, &i);) {
            const int64_t block = i / work.parts, part = i % work.parts;
            const int64_t begin = units * block / work.blocks * kSplitLines;
            const int64_t end = std::min(args.rows, units * (block + 1) / work.blocks * kSplitLines);
            for (int64_t turn = 0; turn < turns; ++turn) {
                const int64_t from = steps * turn / turns, to = steps * (turn + 1) / turns;
                if (turns > 1 || packed_block != block)
                    VITFAST_AMX_TILES::pack_split_left(args, begin, end, from, to, left);
                VITFAST_AMX_TILES::multiply_split_rows(args, left, words, begin, end, panels * part / work.parts,
                                                       panels * (part + 1) / work.parts, from, to, sums);
            }
            packed_block = block;
        }
    });
}
#else
void pack_split(const RightOperand<float>&, uint32_t*) {}
void multiply_split(const Product<float, float>&, const RightOperand<float>&) {}
#endif

}  // namespace vitfast
