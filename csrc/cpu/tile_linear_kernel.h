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
// and after that
#include "tile_finish.h"

// Tiles: see amx_tiles.h. They are loaded as soon as the last product that needs the old ones has begun.
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

// The sums in tiles 0 to 3, and the products of `steps` steps of fp32's parts.
template <bool kLower, bool kRight, class Between>
VITFAST_INLINE void add_products(float, const uint32_t* a, const uint32_t* b, int64_t steps, Between& between) {
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
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  VITFAST_UPPER_RIGHT VITFAST_UPPER(0)
        VITFAST_LOWER_RIGHT VITFAST_LOWER(0)
        between.finish(step);
        a += kTileStep<float>;
        b += kTileStep<float>;
        // 0 with 0
        const bool more = step + 1 < steps;
        VITFAST_UPPER_LEFT  VITFAST_LOWER_LEFT  if (more) { VITFAST_LEFT(2) }
        VITFAST_UPPER_RIGHT if (more) { VITFAST_UPPER(0) }
        VITFAST_LOWER_RIGHT if (more) { VITFAST_LOWER(0) VITFAST_RIGHT(2) }
    }
    // clang-format on
}

#define VITFAST_DOT(sum, left, right)                \
    if constexpr (std::is_same_v<Number, uint8_t>) { \
        _tile_dpbusd(sum, left, right);              \
    } else {                                         \
        _tile_dpbf16ps(sum, left, right);            \
    }

// The same of bf16, or of 8-bit integers.
template <bool kLower, bool kRight, class Number, class Between>
VITFAST_INLINE void add_products(Number, const uint32_t* a, const uint32_t* b, int64_t steps, Between& between) {
    for (int64_t step = 0; step < steps; ++step) {
        VITFAST_UPPER(0)
        VITFAST_LEFT(0)
        VITFAST_DOT(0, 4, 6)
        between.fetch();
        VITFAST_LOWER(0)
        if constexpr (kLower) VITFAST_DOT(2, 5, 6)
        between.fetch();
        VITFAST_RIGHT(0)
        if constexpr (kRight) VITFAST_DOT(1, 4, 7)
        between.finish(step);
        if constexpr (kLower && kRight) VITFAST_DOT(3, 5, 7)
        a += kTileStep<Number>;
        b += kTileStep<Number>;
    }
}

#undef VITFAST_DOT
#undef VITFAST_UPPER
#undef VITFAST_LOWER
#undef VITFAST_LEFT
#undef VITFAST_RIGHT
#undef VITFAST_UPPER_LEFT
#undef VITFAST_UPPER_RIGHT
#undef VITFAST_LOWER_LEFT
#undef VITFAST_LOWER_RIGHT

// sums[rows, 16 or (kRight) 32 columns] = (or +=) A * B over `steps` steps; rows as configured, kLower: more than 16.
template <class P, bool kLower, bool kRight, class Between>
VITFAST_INLINE void multiply_packed(const uint32_t* a, const uint32_t* b, int64_t steps, typename P::Sum* sums,
                                    bool add, Between& between) {
    constexpr int64_t kPitch = kSumsRow * sizeof(float);
    begin_sums<kLower, kRight>(sums, kPitch, add);
    add_products<kLower, kRight>(typename P::Number{}, a, b, steps, between);
    store_sums<kLower, kRight>(sums, kPitch);
}

template <class P, class Between>
VITFAST_INLINE void multiply_packed(int64_t rows, int64_t columns, const uint32_t* a, const uint32_t* b, int64_t steps,
                                    typename P::Sum* sums, bool add, Between& between) {
    if (rows > kTile && columns > kTile) return multiply_packed<P, true, true>(a, b, steps, sums, add, between);
    if (rows > kTile) return multiply_packed<P, true, false>(a, b, steps, sums, add, between);
    if (columns > kTile) return multiply_packed<P, false, true>(a, b, steps, sums, add, between);
    multiply_packed<P, false, false>(a, b, steps, sums, add, between);
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
        const int64_t at = from * a.outputs + column, size = sizeof(*a.out), pitch = a.outputs * size;
        outputs = outputs_ahead(a, from, height, column, columns, steps);
        if (a.residual) residual = rows_ahead(a.residual + at, height, columns * size, pitch, steps);
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
    const bool at_once = steps == all_steps;
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
                typename P::Sum* const block_sums = sums + (at_once ? slot % (units + 1) : slot) * kBlockSums;
                if (finish) between.expect_rows(row, height, column, count);
                multiply_packed<P>(height, count, left + (unit * pitch + hot) * kTileStep<Number>,
                                   block + hot * kTileStep<Number>, hot_end - hot, block_sums, from + hot > 0, between);
                between.finish_to(kTileLines);
                if (finish) between.begin(block_sums, row, height, column, count);
            }
        }
    }
    between.finish_to(kTileLines);
    configure_tiles(0);
}
#endif
