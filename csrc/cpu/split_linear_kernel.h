// Operands in three parts, and their products by AMX's tiles. Included by for_each_isa.h; nothing where there are none.
// A packed block of 32 lines (rows of the left operand, columns of the right one): [step][part][two tiles][16][16 words].
// Word w of a step holds the numbers w and w + 16 of its 32. A tile's rows are, on the left, lines; on the right, words.
#if VITFAST_AMX
#include "gemm.h"
#include "vec_math.h"
// after those
#include "linear_finish.h"

constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kPartWords = 2 * kTileWords;

// parts[i]: words of the i-th parts of two vectors of numbers.
VITFAST_INLINE void split(Vec low, Vec high, Vec parts[kSplitParts]) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
#pragma GCC unroll 3
    for (int i = 0; i < kSplitParts; ++i) {
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        const UVec words = (UVec)_mm512_permutexvar_epi16(interleave, rounded);
        parts[i] = (Vec)words;
        low -= (Vec)(words << 16);
        high -= (Vec)(words & 0xffff0000u);
    }
}

// The tile of up to 16 lines of a step that has `numbers` more numbers. kAlong: a line's numbers are neighbours, lines
// are `stride` apart; else the other way round.
template <bool kAlong, bool kRight>
void pack_split_tile(const float* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    constexpr bool kTranspose = kAlong == kRight;
    alignas(64) uint32_t made[kSplitParts * kTileWords];
    uint32_t* const rows = kTranspose ? made : to;
    constexpr int64_t kPitch = kTranspose ? kTileWords : kPartWords;
    const bool whole = lines >= kTile && numbers >= kSplitNumbers;
#pragma GCC unroll 2
    for (int64_t i = 0; i < kTile; ++i) {
        const float *const from = x + i * stride, *const second = kAlong ? from + kTile : from + kTile * stride;
        Vec low{}, high{}, parts[kSplitParts];
        if (whole) {
            low = load(from);
            high = load(second);
        } else if (kAlong && i < lines) {
            low = load(from, numbers);
            if (numbers > kTile) high = load(second, numbers - kTile);
        } else if (!kAlong) {
            if (i < numbers) low = load(from, lines);
            if (i + kTile < numbers) high = load(second, lines);
        }
        split(low, high, parts);
#pragma GCC unroll 3
        for (int p = 0; p < kSplitParts; ++p) store_words(rows + p * kPitch + i * kTile, parts[p]);
    }
    if constexpr (kTranspose) {
        for (int p = 0; p < kSplitParts; ++p) transpose_block(made + p * kTileWords, kTile, to + p * kPartWords, kTile);
    }
}

// A block of up to 32 lines; where there are at most 16, the second tiles of the left operand stay as they are.
template <bool kAlong, bool kRight>
void pack_split_block(const float* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    for (int64_t half = 0; half < 2; ++half) {
        if (!kRight && half * kTile >= lines) return;
        const float* const first = x + half * kTile * (kAlong ? stride : 1);
        for (int64_t k = 0; k < numbers; k += kSplitNumbers) {
            uint32_t* const tile = to + k / kSplitNumbers * kSplitStepWords + half * kTileWords;
            pack_split_tile<kAlong, kRight>(first + k * (kAlong ? 1 : stride), stride, lines - half * kTile, numbers - k,
                                            tile);
        }
    }
}

// The parts whose products are made, in an order in which one operand's tiles stay from one to the next.
#define VITFAST_SPLIT_LEFT(part)                  \
    _tile_loadd(4, a + (part) * kPartWords, 64);  \
    if constexpr (kLower) _tile_loadd(5, a + (part) * kPartWords + kTileWords, 64);
#define VITFAST_SPLIT_RIGHT(part)                 \
    _tile_loadd(6, b + (part) * kPartWords, 64);  \
    if constexpr (kRight) _tile_loadd(7, b + (part) * kPartWords + kTileWords, 64);
#define VITFAST_SPLIT_DOT                                 \
    _tile_dpbf16ps(0, 4, 6);                              \
    if constexpr (kRight) _tile_dpbf16ps(1, 4, 7);        \
    if constexpr (kLower) _tile_dpbf16ps(2, 5, 6);        \
    if constexpr (kLower && kRight) _tile_dpbf16ps(3, 5, 7);

// C[rows, 16 or (kRight) 32 columns] = (or +=) A * B over `steps` steps; rows as configured, kLower: more than 16.
template <bool kLower, bool kRight>
VITFAST_INLINE void multiply_split_tiles(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, int64_t c_row,
                                         bool add, Streams* streams) {
    float* const lower = c + kTile * c_row;
    const int64_t pitch = c_row * sizeof(float);
    settle_memory();
    if (add) {
        _tile_loadd(0, c, pitch);
        if constexpr (kRight) _tile_loadd(1, c + kTile, pitch);
        if constexpr (kLower) _tile_loadd(2, lower, pitch);
        if constexpr (kLower && kRight) _tile_loadd(3, lower + kTile, pitch);
    } else {
        _tile_zero(0);
        if constexpr (kRight) _tile_zero(1);
        if constexpr (kLower) _tile_zero(2);
        if constexpr (kLower && kRight) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
        VITFAST_SPLIT_LEFT(0)
        VITFAST_SPLIT_RIGHT(2)
        VITFAST_SPLIT_DOT
        VITFAST_SPLIT_RIGHT(1)
        VITFAST_SPLIT_DOT
        VITFAST_SPLIT_LEFT(1)
        VITFAST_SPLIT_DOT
        VITFAST_SPLIT_RIGHT(0)
        VITFAST_SPLIT_DOT
        VITFAST_SPLIT_LEFT(2)
        VITFAST_SPLIT_DOT
        VITFAST_SPLIT_LEFT(0)
        VITFAST_SPLIT_DOT
        streams->fetch();
        a += kSplitStepWords;
        b += kSplitStepWords;
    }
    _tile_stored(0, c, pitch);
    if constexpr (kRight) _tile_stored(1, c + kTile, pitch);
    if constexpr (kLower) _tile_stored(2, lower, pitch);
    if constexpr (kLower && kRight) _tile_stored(3, lower + kTile, pitch);
    settle_memory();
}

#undef VITFAST_SPLIT_LEFT
#undef VITFAST_SPLIT_RIGHT
#undef VITFAST_SPLIT_DOT

VITFAST_INLINE void multiply_split_tiles(int64_t rows, int64_t columns, const uint32_t* a, const uint32_t* b,
                                         int64_t steps, float* c, int64_t c_row, bool add, Streams* streams) {
    if (rows > kTile && columns > kTile) return multiply_split_tiles<true, true>(a, b, steps, c, c_row, add, streams);
    if (rows > kTile) return multiply_split_tiles<true, false>(a, b, steps, c, c_row, add, streams);
    if (columns > kTile) return multiply_split_tiles<false, true>(a, b, steps, c, c_row, add, streams);
    multiply_split_tiles<false, false>(a, b, steps, c, c_row, add, streams);
}

// Block `index` of the right operand.
inline void pack_split_right(const RightOperand<float>& right, int64_t index, uint32_t* packed) {
    const int64_t first = index * kSplitLines, count = std::min(kSplitLines, right.outputs - first);
    uint32_t* const to = packed + index * split_steps(right.inputs) * kSplitStepWords;
    if (right.transposed) {
        pack_split_block<false, true>(right.x + first, right.row_stride, count, right.inputs, to);
    } else {
        pack_split_block<true, true>(right.x + first * right.row_stride, right.row_stride, count, right.inputs, to);
    }
}

// Rows [begin, end) of the left operand over the steps [from, to).
inline void pack_split_left(const Product<float, float>& a, int64_t begin, int64_t end, int64_t from, int64_t to,
                            uint32_t* packed) {
    const int64_t start = from * kSplitNumbers, numbers = std::min(a.inputs, to * kSplitNumbers) - start;
    for (int64_t row = begin; row < end; row += kSplitLines) {
        uint32_t* const block = packed + (row - begin) / kSplitLines * (to - from) * kSplitStepWords;
        const int64_t rows = std::min(kSplitLines, end - row);
        if (a.transposed) {
            pack_split_block<false, false>(a.x + start * a.rows + row, a.rows, rows, numbers, block);
        } else {
            pack_split_block<true, false>(a.x + row * a.inputs + start, a.inputs, rows, numbers, block);
        }
    }
}

// Output rows [begin, end) and panels [first, last), over the steps [from, to). left: packed rows of those steps; right:
// all of the packed operand. sums: [panel][row][kPanelColumns], of the steps before `from`; finished when `to` is the
// last step. Where the steps are all there are, one block's sums.
inline void multiply_split_rows(const Product<float, float>& a, const uint32_t* left, const uint32_t* right,
                                int64_t begin, int64_t end, int64_t first, int64_t last, int64_t from, int64_t to,
                                float* sums) {
    const int64_t all_steps = split_steps(a.inputs), steps = to - from, rows = end - begin;
    const bool at_once = steps == all_steps;
    int64_t configured = 0;
    for (int64_t panel = first; panel < last; ++panel) {
        const int64_t column = panel * kPanelColumns, count = std::min(kPanelColumns, a.outputs - column);
        const uint32_t* const block = right + (column / kSplitLines * all_steps + from) * kSplitStepWords;
        float* const panel_sums = at_once ? sums : sums + (panel - first) * rows * kPanelColumns;
        // The next panel comes into L2 while this one is in use.
        const int64_t next = panel + 1 < last ? std::min<int64_t>(2, split_blocks(a.outputs - column - kPanelColumns)) : 0;
        const int64_t times = std::max<int64_t>(1, split_blocks(rows) * split_blocks(count) * steps);
        const uint32_t* const ahead = block + 2 * all_steps * kSplitStepWords;
        Streams streams{stream_rows(ahead, next, steps * kSplitStepWords * 4, all_steps * kSplitStepWords * 4, times), {}, {}};
        for (int64_t m = 0; m < rows; m += kSplitLines) {
            const int64_t height = std::min(rows - m, kSplitLines);
            if (configured != height) configure_tiles(configured = height);
            float* const block_sums = at_once ? sums : panel_sums + m * kPanelColumns;
            if (to == all_steps) {
                stream_outputs(&streams, a.out, a.residual, (begin + m) * a.outputs + column, height, count, a.outputs,
                               split_blocks(count) * steps);
            }
            for (int64_t j = 0; j < count; j += kSplitLines) {
                multiply_split_tiles(height, count - j, left + m / kSplitLines * steps * kSplitStepWords,
                                     block + j / kSplitLines * all_steps * kSplitStepWords, steps, block_sums + j,
                                     kPanelColumns, from > 0, &streams);
            }
            if (to == all_steps) finish_rows(a, block_sums, begin + m, height, column, count);
        }
    }
    configure_tiles(0);
}
#endif
