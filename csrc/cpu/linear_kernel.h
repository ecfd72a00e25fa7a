// One block of rows times one panel of a packed operand, and what becomes of the sums. Included by for_each_isa.h.
// The packed operand: panels of kPanelColumns columns, [words][columns], one after the other; the columns of the last
// are rounded up to kPanelStep. The same for every instruction set but AMX (tile_pack.h).
#include "gemm.h"
#include "vec_math.h"
// after those
#include "few_rows.h"
#include "parameter.h"
// after that
#include "linear_finish.h"

constexpr int kPanelVecs = VITFAST_LEVEL >= 2 ? 4 : 2;  // of a register tile; divides a whole panel's

template <class Y>
constexpr bool kInPairs = std::is_same_v<Y, bf16>;

// Panel `index` of x[outputs, inputs] (contracted over inputs) or, transposed, of x[inputs, outputs].
template <class Y>
void pack_panel(const RightOperand<Y>& p, int64_t index, uint32_t* panel) {
    constexpr bool kPairs = kInPairs<Y>;
    const int64_t first = index * kPanelColumns, count = std::min(kPanelColumns, p.outputs - first);
    const int64_t columns = panel_columns(p.outputs, index);
    if (p.transposed) {
        row_panel<kPairs>(p.x + first, p.row_stride, p.inputs, count, columns, panel);
    } else {
        transposed_panel<kPairs>(p.x + first * p.row_stride, p.row_stride, count, p.inputs, columns, panel);
    }
}

template <bool kPairs>
VITFAST_INLINE void multiply_vectors(int64_t vectors, int rows, Operand a, const uint32_t* panel, int64_t columns,
                                     int64_t words, float* sums, bool add, Ahead* ahead) {
    switch (vectors) {
#if VITFAST_LEVEL >= 2
        case 1:
            return multiply_rows<kPairs, 1>(rows, a, panel, columns, words, sums, kPanelColumns, add, ahead);
        case 2:
            return multiply_rows<kPairs, 2>(rows, a, panel, columns, words, sums, kPanelColumns, add, ahead);
        case 3:
            return multiply_rows<kPairs, 3>(rows, a, panel, columns, words, sums, kPanelColumns, add, ahead);
#endif
        default:
            return multiply_rows<kPairs, kPanelVecs>(rows, a, panel, columns, words, sums, kPanelColumns, add, ahead);
    }
}

// Output rows [begin, begin + rows) and the columns of panel `index`; left: the left operand from row `begin` on;
// sums: kBlockRows * kPanelColumns numbers of scratch.
template <class X, class Y>
void multiply_panel(const Product<X, Y>& a, Operand left, int64_t begin, int64_t rows, int64_t index,
                    const uint32_t* right, float* sums, Ahead* ahead) {
    constexpr bool kPairs = kInPairs<Y>;
    const int64_t words = words_for<kPairs>(a.inputs), columns = panel_columns(a.outputs, index);
    const int64_t first = index * kPanelColumns, count = std::min(kPanelColumns, a.outputs - first);
    const int64_t blocks = std::max<int64_t>(1, (words + kDepth - 1) / kDepth),
                  tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = words * block / blocks, to = words * (block + 1) / blocks;
        const uint32_t* const panel = right + from * columns;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t m = rows * tile / tiles, height = rows * (tile + 1) / tiles - m;
            const Operand part{left.data + m * left.row + from * left.word, left.row, left.word};
            float* const tile_sums = blocks == 1 ? sums : sums + m * kPanelColumns;
            const bool last = block == blocks - 1;
            for (int64_t i = 0; last && i < height; ++i) {
                const int64_t start = (begin + m + i) * a.outputs + first;
                prefetch_row_to_write(a.out + start, count);
                if (a.residual) prefetch_row(a.residual + start, count);
            }
            for (int64_t j = 0; j < columns; j += kPanelVecs * kLanes) {
                const int64_t vectors = std::min<int64_t>(kPanelVecs, (columns - j) / kLanes);
                multiply_vectors<kPairs>(vectors, height, part, panel + j, columns, to - from, tile_sums + j, block > 0,
                                         ahead);
            }
            if (last) finish_rows(a, tile_sums, kPanelColumns, begin + m, height, first, count);
        }
    }
}

// Rows [begin, begin + rows) of the left operand: in place where it can be, else packed into scratch, which has room
// for rows (rounded up to whole vectors) * words.
template <class X, class Y>
Operand left_rows(const Product<X, Y>& a, int64_t begin, int64_t rows, uint32_t* scratch) {
    constexpr bool kPairs = kInPairs<Y>;
    if (!a.transposed) return row_operand<kPairs>(a.x + begin * a.inputs, a.inputs, rows, a.inputs, scratch);
    const int64_t columns = round_to_lanes(rows);
    row_panel<kPairs>(a.x + begin, a.rows, a.inputs, rows, columns, scratch);
    return {scratch, 1, columns};
}

// Panel `index` of `words` words as memory to fetch in `times` times.
template <class Y>
Ahead fetch_panel(const RightOperand<Y>& right, int64_t index, int64_t words, int64_t times) {
    const int64_t first = index * kPanelColumns, count = std::min(kPanelColumns, right.outputs - first);
    if (count <= 0) return {nullptr, 0, 0, 0, 0};
    if (right.packed) {
        const int64_t bytes = panel_columns(right.outputs, index) * words * 4;
        return {reinterpret_cast<const char*>(right.packed + first * words), 1, bytes, 0, bytes / 64 / times + 1};
    }
    const int64_t rows = right.transposed ? right.inputs : count, width = right.transposed ? count : right.inputs;
    const int64_t lines = rows * (width * sizeof(Y) / 64 + 1);
    const Y* const start = right.x + (right.transposed ? first : first * right.row_stride);
    return {reinterpret_cast<const char*>(start), rows, int64_t(width * sizeof(Y)),
            int64_t(right.row_stride * sizeof(Y)), lines / times + 1};
}

// Output rows [begin, end) of panel `index`, which is packed first if it is not yet; meanwhile panel `next` comes
// closer.
template <class X, class Y>
void pack_and_multiply(const Product<X, Y>& a, const RightOperand<Y>& right, int64_t begin, int64_t end, int64_t index,
                       int64_t next, const Workspace& w) {
    if constexpr (std::is_same_v<Y, float>) {
        if (end - begin <= kFewRows && !right.transposed) {
            const int64_t first = index * kPanelColumns, count = std::min(kPanelColumns, a.outputs - first);
            multiply_few_rows(end - begin, a.x + begin * a.inputs, right.x + first * right.row_stride, right.row_stride,
                              a.inputs, count, w.sums);
            return finish_rows(a, w.sums, kPanelColumns, begin, end - begin, first, count);
        }
    }
    const int64_t words = words_for<kInPairs<Y>>(a.inputs), steps = (end - begin + kTileRows - 1) / kTileRows;
    const int64_t times = steps * ((words + kAheadWords - 1) / kAheadWords);  // how often a product fetches
    Ahead ahead = fetch_panel(right, next, words, std::max<int64_t>(times, 1));
    if (!right.packed) pack_panel(right, index, w.panel);
    const uint32_t* const panel = right.packed ? right.packed + index * kPanelColumns * words : w.panel;
    const int64_t blocks = (steps * kTileRows + kBlockRows - 1) / kBlockRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = begin + steps * block / blocks * kTileRows;
        const int64_t rows = std::min(end, begin + steps * (block + 1) / blocks * kTileRows) - from;
        multiply_panel(a, left_rows(a, from, rows, w.left), from, rows, index, panel, w.sums, &ahead);
    }
}

// Output rows [begin, begin + rows) of the panels [first, last) that are packed already.
template <class X, class Y>
void multiply_packed(const Product<X, Y>& a, const uint32_t* packed, int64_t begin, int64_t rows, int64_t first,
                     int64_t last, const Workspace& w) {
    const Operand left = left_rows(a, begin, rows, w.left);
    for (int64_t panel = first; panel < last; ++panel) {
        const uint32_t* const right = packed + panel * kPanelColumns * words_for<kInPairs<Y>>(a.inputs);
        multiply_panel(a, left, begin, rows, panel, right, w.sums, nullptr);
    }
}
