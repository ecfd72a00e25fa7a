// Products by AMX's tiles, and what becomes of their sums. Included by for_each_isa.h; nothing where there are no
// tiles.
#if VITFAST_AMX
#include "gemm.h"
#include "vec_math.h"
// after those
#include "parameter.h"
// after that
#include "int8_finish.h"
#include "linear_finish.h"
#include "tile_pack.h"
#include "tile_products.h"
// and after that
#include "tile_finish.h"

// Blocks [begin, end) of the right operand.
template <class Y>
void pack_right(const RightOperand<Y>& right, int64_t begin, int64_t end, uint32_t* packed) {
    const int64_t first = begin * kTileLines, count = std::min(end * kTileLines, right.outputs) - first;
    uint32_t* const to = packed + begin * tile_steps<Y>(right.inputs) * kTileStep<Y>;
    if (right.transposed) {
        pack_lines<false, true>(right.x + first, right.row_stride, count, right.inputs, to);
    } else {
        pack_lines<true, true>(right.x + first * right.row_stride, right.row_stride, count, right.inputs, to);
    }
}

// Rows [begin, end) of the left operand over the steps [from, to).
template <class X, class Y>
void pack_left(const Product<X, Y>& a, int64_t begin, int64_t end, int64_t from, int64_t to, uint32_t* packed) {
    const int64_t start = from * kTileNumbers<Y>, numbers = std::min(a.inputs, to * kTileNumbers<Y>) - start;
    if (a.transposed) {
        pack_lines<false, false>(a.x + start * a.rows + begin, a.rows, end - begin, numbers, packed);
    } else {
        pack_lines<true, false>(a.x + begin * a.inputs + start, a.inputs, end - begin, numbers, packed);
    }
}

template <class Y>
void pack_left(const Int8Product<Y>& a, int64_t begin, int64_t end, int64_t from, int64_t to, uint32_t* packed) {
    const int64_t start = from * kTileNumbers<uint8_t>, last = std::min(a.inputs, to * kTileNumbers<uint8_t>);
    pack_lines<true, false>(a.q + begin * a.pitch + start, a.pitch, end - begin, last - start, packed);
}

// What is done while the tiles multiply a block: the next block of the right operand comes into L2, evenly, as the
// tiles' own loads wait for the same buffers; and the rows of the block before are finished.
template <class P>
struct Meanwhile {
    using Number = typename P::Number;
    static constexpr int64_t kFetches = std::is_same_v<Number, float> ? 8 : 2;  // in each step
    const P& a;
    const char* next = nullptr;
    int64_t lines = 0;  // at each fetch
    int64_t steps = 1;  // until the rows have to be finished
    const int64_t at_once = rows_at_once(a);
    Ahead residual{}, outputs{};
    const typename P::Sum* sums = nullptr;  // of the block before
    int64_t row = 0, rows = 0, first = 0, count = 0, done = 0;

    // The right operand's block that comes next, or null: to be fetched while `units` units of rows are multiplied.
    void expect(const uint32_t* right, int64_t right_steps, int64_t units) {
        next = reinterpret_cast<const char*>(right);
        const int64_t all = right_steps * kTileStep<Number> * sizeof(uint32_t) / 64;
        lines = right ? all / std::max<int64_t>(1, units * right_steps * kFetches) + 1 : 0;
    }

    // Where the rows that are multiplied now will be written to, and what they are added to, comes closer.
    void expect_rows(int64_t from, int64_t height, int64_t column, int64_t columns) {
        outputs = outputs_ahead(a, from, height, column, columns, steps);
        if (a.residual) residual = block_ahead(a, a.residual, from, height, column, columns, steps);
    }

    VITFAST_INLINE_MEMBER void fetch() {
        for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }

    VITFAST_INLINE_MEMBER void finish(int64_t step) {
        residual.fetch();
        outputs.template fetch<true>();
        const int64_t due = (step + 1) * kTileLines / steps & -at_once;
        if (due > done) finish_to(due);
    }

    VITFAST_INLINE_MEMBER void finish_to(int64_t end) {
        end = std::min(end, rows);
        if (end <= done) return;
        finish_block(a, sums + done * kSumsRow, row + done, end - done, first, count);
        done = end;
    }

    // These rows' sums are the ones to finish from now on.
    void begin(const typename P::Sum* made, int64_t from, int64_t height, int64_t column, int64_t columns) {
        sums = made;
        row = from;
        rows = height;
        first = column;
        count = columns;
        done = 0;
    }
};

// Steps whose part of a right block stays in L1 while the rows pass: 24 KiB. fp32's parts take three times as much, and
// their products so much longer that L2 delivers as well.
template <class Number>
constexpr int64_t kHotSteps = std::is_same_v<Number, float> ? 1 << 20 : 12;

// Output rows [begin, end) and the columns of the blocks [first, last), over the steps [from, to). left: packed rows,
// whose blocks are `pitch` steps long, from step `from` on; right: all of the packed operand. sums: of one block more
// than there are of rows, or, where `from` and `to` are not all steps, of all blocks, with the sums of the steps
// before; finished when `to` is the last step.
template <class P>
void multiply_rows_by_tiles(const P& a, const uint32_t* left, int64_t pitch, const uint32_t* right, int64_t begin,
                            int64_t end, int64_t first, int64_t last, int64_t from, int64_t to, typename P::Sum* sums) {
    using Number = typename P::Number;
    const int64_t all_steps = tile_steps<Number>(a.inputs), steps = to - from, units = tile_blocks(end - begin);
    const bool one_turn = steps == all_steps;
    const int64_t parts = std::max<int64_t>(1, (steps + kHotSteps<Number> - 1) / kHotSteps<Number>);
    int64_t configured = 0;
    Meanwhile<P> between{a};
    for (int64_t index = first; index < last; ++index) {
        const int64_t column = index * kTileLines, count = std::min(kTileLines, a.outputs - column);
        const uint32_t* const block = right + (index * all_steps + from) * kTileStep<Number>;
        between.expect(index + 1 < last ? block + all_steps * kTileStep<Number> : nullptr, steps, units);
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t hot = steps * part / parts, hot_end = steps * (part + 1) / parts;
            const bool finish = to == all_steps && part == parts - 1;
            between.steps = std::max<int64_t>(1, hot_end - hot);
            for (int64_t unit = 0; unit < units; ++unit) {
                const int64_t row = begin + unit * kTileLines, height = std::min(end - row, kTileLines);
                if (configured != height) configure_tiles(configured = height);
                const int64_t slot = (index - first) * units + unit;
                typename P::Sum* const block_sums = sums + (one_turn ? slot % (units + 1) : slot) * kBlockSums;
                if (finish) between.expect_rows(row, height, column, count);
                multiply_packed(Number{}, height, count, left + (unit * pitch + hot) * kTileStep<Number>,
                                block + hot * kTileStep<Number>, hot_end - hot, block_sums, kSumsRow, from + hot > 0,
                                between);
                between.finish_to(kTileLines);
                if (finish) between.begin(block_sums, row, height, column, count);
            }
        }
    }
    between.finish_to(kTileLines);
    configure_tiles(0);
}
#endif
