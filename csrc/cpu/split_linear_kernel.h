// Operands in three parts, and their products by AMX's tiles. Included by for_each_isa.h; nothing where there are none.
// A packed block of 32 lines (rows of the left operand, columns of the right one): [step][part][two tiles][16][16
// words]. Word w of a step holds the numbers w and w + 16 of its 32. A tile's rows are, on the left, lines; on the
// right, words.
#if VITFAST_AMX
#include "gemm.h"
#include "vec_math.h"
// after those
#include "linear_finish.h"

constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kPartWords = 2 * kTileWords;

// parts[i]: words of the i-th parts of two vectors of numbers.
VITFAST_INLINE void split(Vec low, Vec high, Vec parts[kSplitParts]) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
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
            if (!kAlong) {
                __builtin_prefetch(from + kSplitNumbers * stride);
                __builtin_prefetch(second + kSplitNumbers * stride);
            }
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

// Lines of an operand, in blocks of `steps` steps each; the left operand's rows past its last line stay as they are.
template <bool kAlong, bool kRight>
void pack_split_lines(const float* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    const int64_t steps = split_steps(numbers), tiles = kRight ? split_blocks(lines) * 2 : (lines + kTile - 1) / kTile;
    const auto pack = [&](int64_t tile, int64_t step) __attribute__((always_inline)) {
        const int64_t line = tile * kTile, number = step * kSplitNumbers;
        pack_split_tile<kAlong, kRight>(x + (kAlong ? line * stride + number : number * stride + line), stride,
                                        lines - line, numbers - number,
                                        to + (tile / 2 * steps + step) * kSplitStepWords + tile % 2 * kTileWords);
    };
    if (kAlong) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int64_t step = 0; step < steps; ++step) pack(tile, step);
        }
    } else {
        for (int64_t step = 0; step < steps; ++step) {
            for (int64_t tile = 0; tile < tiles; ++tile) pack(tile, step);
        }
    }
}

// Tiles are loaded as soon as the last product that needs the old ones has begun.
#define VITFAST_UPPER(part) _tile_loadd(4, a + (part) * kPartWords, 64);
#define VITFAST_LOWER(part) \
    if constexpr (kLower) _tile_loadd(5, a + (part) * kPartWords + kTileWords, 64);
#define VITFAST_LEFT(part) _tile_loadd(6, b + (part) * kPartWords, 64);
#define VITFAST_RIGHT(part) \
    if constexpr (kRight) _tile_loadd(7, b + (part) * kPartWords + kTileWords, 64);
#define VITFAST_UPPER_LEFT _tile_dpbf16ps(0, 4, 6);
#define VITFAST_UPPER_RIGHT \
    if constexpr (kRight) _tile_dpbf16ps(1, 4, 7);
#define VITFAST_LOWER_LEFT \
    if constexpr (kLower) _tile_dpbf16ps(2, 5, 6);
#define VITFAST_LOWER_RIGHT \
    if constexpr (kLower && kRight) _tile_dpbf16ps(3, 5, 7);

// C[rows, 16 or (kRight) 32 columns] = (or +=) A * B over `steps` steps; rows as configured, kLower: more than 16.
template <bool kLower, bool kRight, class Between>
VITFAST_INLINE void multiply_split_tiles(const uint32_t* a, const uint32_t* b, int64_t steps, float* c, int64_t c_row,
                                         bool add, Between& between) {
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
    if (steps > 0) {
        VITFAST_UPPER(0) VITFAST_LEFT(2) VITFAST_LOWER(0) VITFAST_RIGHT(2)
    }
    // clang-format off
    for (int64_t step = 0; step < steps; ++step) {
        // part 0 of A with 2 of B
        VITFAST_UPPER_LEFT  between.fetch(); VITFAST_LOWER_LEFT  VITFAST_LEFT(1)
        VITFAST_UPPER_RIGHT between.fetch(); VITFAST_LOWER_RIGHT VITFAST_RIGHT(1)
        // 0 with 1
        VITFAST_UPPER_LEFT  between.fetch(); VITFAST_LOWER_LEFT  VITFAST_UPPER_RIGHT VITFAST_UPPER(1)
        VITFAST_LOWER_RIGHT between.fetch(); VITFAST_LOWER(1)
        // 1 with 1
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  between.fetch(); VITFAST_LEFT(0)
        VITFAST_UPPER_RIGHT VITFAST_LOWER_RIGHT between.fetch(); VITFAST_RIGHT(0)
        // 1 with 0
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  between.fetch(); VITFAST_UPPER_RIGHT VITFAST_UPPER(2)
        VITFAST_LOWER_RIGHT between.fetch(); VITFAST_LOWER(2)
        // 2 with 0
        VITFAST_UPPER_LEFT  VITFAST_UPPER_RIGHT VITFAST_UPPER(0)
        VITFAST_LOWER_LEFT  VITFAST_LOWER_RIGHT VITFAST_LOWER(0)
        between.finish(step);
        a += kSplitStepWords;
        b += kSplitStepWords;
        // 0 with 0
        const bool more = step + 1 < steps;
        VITFAST_UPPER_LEFT  VITFAST_UPPER_RIGHT if (more) { VITFAST_UPPER(0) }
        VITFAST_LOWER_LEFT  if (more) { VITFAST_LEFT(2) }
        VITFAST_LOWER_RIGHT if (more) { VITFAST_LOWER(0) VITFAST_RIGHT(2) }
    }
    // clang-format on
    _tile_stored(0, c, pitch);
    if constexpr (kRight) _tile_stored(1, c + kTile, pitch);
    if constexpr (kLower) _tile_stored(2, lower, pitch);
    if constexpr (kLower && kRight) _tile_stored(3, lower + kTile, pitch);
    settle_memory();
}

#undef VITFAST_UPPER
#undef VITFAST_LOWER
#undef VITFAST_LEFT
#undef VITFAST_RIGHT
#undef VITFAST_UPPER_LEFT
#undef VITFAST_UPPER_RIGHT
#undef VITFAST_LOWER_LEFT
#undef VITFAST_LOWER_RIGHT

template <class Between>
VITFAST_INLINE void multiply_split_tiles(int64_t rows, int64_t columns, const uint32_t* a, const uint32_t* b,
                                         int64_t steps, float* c, int64_t c_row, bool add, Between& between) {
    if (rows > kTile && columns > kTile) return multiply_split_tiles<true, true>(a, b, steps, c, c_row, add, between);
    if (rows > kTile) return multiply_split_tiles<true, false>(a, b, steps, c, c_row, add, between);
    if (columns > kTile) return multiply_split_tiles<false, true>(a, b, steps, c, c_row, add, between);
    multiply_split_tiles<false, false>(a, b, steps, c, c_row, add, between);
}

// Blocks [begin, end) of the right operand.
inline void pack_split_right(const RightOperand<float>& right, int64_t begin, int64_t end, uint32_t* packed) {
    const int64_t first = begin * kSplitLines, count = std::min(end * kSplitLines, right.outputs) - first;
    uint32_t* const to = packed + begin * split_steps(right.inputs) * kSplitStepWords;
    if (right.transposed) {
        pack_split_lines<false, true>(right.x + first, right.row_stride, count, right.inputs, to);
    } else {
        pack_split_lines<true, true>(right.x + first * right.row_stride, right.row_stride, count, right.inputs, to);
    }
}

// Rows [begin, end) of the left operand over the steps [from, to).
inline void pack_split_left(const Product<float, float>& a, int64_t begin, int64_t end, int64_t from, int64_t to,
                            uint32_t* packed) {
    const int64_t start = from * kSplitNumbers, numbers = std::min(a.inputs, to * kSplitNumbers) - start;
    if (a.transposed) {
        pack_split_lines<false, false>(a.x + start * a.rows + begin, a.rows, end - begin, numbers, packed);
    } else {
        pack_split_lines<true, false>(a.x + begin * a.inputs + start, a.inputs, end - begin, numbers, packed);
    }
}

// What is done while the tiles multiply a block: the next block of the right operand comes into L2, evenly, as the
// tiles' own loads wait for the same buffers; and the rows of the block before are finished.
struct Meanwhile {
    static constexpr int64_t kFetches = 8;  // in each step
    const Product<float, float>& a;
    int64_t steps;
    const char* next = nullptr;
    int64_t lines = 0;  // at each fetch
    Streams streams{{}, {}, {}};
    const float* sums = nullptr;  // of the block before
    int64_t row = 0, rows = 0, first = 0, count = 0, done = 0;

    void prepare(const uint32_t* right, int64_t blocks) {
        const int64_t all = steps * kSplitStepWords * sizeof(uint32_t) / 64;
        next = reinterpret_cast<const char*>(right);
        lines = all / std::max<int64_t>(1, blocks * steps * kFetches) + 1;
    }

    VITFAST_INLINE_MEMBER void fetch() {
        for (int64_t i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }

    VITFAST_INLINE_MEMBER void finish(int64_t step) {
        streams.residual.fetch();
        streams.outputs.fetch<true>();
        finish_to((step + 1) * kSplitLines / steps);
    }

    VITFAST_INLINE_MEMBER void finish_to(int64_t end) {
        end = std::min(end, rows);
        if (end <= done) return;
        finish_rows(a, sums + done * kPanelColumns, row + done, end - done, first, count);
        done = end;
    }

    void begin(const float* made, int64_t from, int64_t height, int64_t column, int64_t columns) {
        sums = made;
        row = from;
        rows = height;
        first = column;
        count = columns;
        done = 0;
    }
};

// Output rows [begin, end) and the columns of the blocks [first, last), over the steps [from, to). left: packed rows of
// those steps; right: all of the packed operand. sums: [block][row][kPanelColumns], of the steps before `from`;
// finished when `to` is the last step. Where the steps are all there are, two blocks' sums in turn.
inline void multiply_split_rows(const Product<float, float>& a, const uint32_t* left, const uint32_t* right,
                                int64_t begin, int64_t end, int64_t first, int64_t last, int64_t from, int64_t to,
                                float* sums) {
    const int64_t all_steps = split_steps(a.inputs), steps = to - from, rows = end - begin;
    const bool at_once = steps == all_steps;
    int64_t configured = 0, turn = 0;
    Meanwhile between{a, steps};
    for (int64_t index = first; index < last; ++index) {
        const int64_t column = index * kSplitLines, count = std::min(kSplitLines, a.outputs - column);
        const uint32_t* const block = right + (index * all_steps + from) * kSplitStepWords;
        between.prepare(index + 1 < last ? block + all_steps * kSplitStepWords : block, split_blocks(rows));
        for (int64_t m = 0; m < rows; m += kSplitLines, turn = 1 - turn) {
            const int64_t height = std::min(rows - m, kSplitLines);
            if (configured != height) configure_tiles(configured = height);
            float* const block_sums =
                sums + (at_once ? turn * kSplitLines : (index - first) * rows + m) * kPanelColumns;
            if (to == all_steps) {
                stream_outputs(&between.streams, a.out, a.residual, (begin + m) * a.outputs + column, height, count,
                               a.outputs, std::max<int64_t>(1, steps));
            }
            multiply_split_tiles(height, count, left + m / kSplitLines * steps * kSplitStepWords, block, steps,
                                 block_sums, kPanelColumns, from > 0, between);
            between.finish_to(kSplitLines);
            if (to == all_steps) between.begin(block_sums, begin + m, height, column, count);
        }
    }
    between.finish_to(kSplitLines);
    configure_tiles(0);
}
#endif
