// What becomes of the sums of a block of tiles, and where: row by row, transposed, or in the order in which the tiles
// of the next product load them. Included by tile_linear_kernel.h after the finishing of rows and tile_pack.h.

constexpr int64_t kBlockSums = kTileLines * kTileLines;
constexpr int64_t kSumsRow = kTileLines;

// Rows of `pitch` bytes whose first `width` bytes are needed, as memory to fetch in `times` parts.
VITFAST_INLINE Ahead rows_ahead(const void* start, int64_t rows, int64_t width, int64_t pitch, int64_t times) {
    return {static_cast<const char*>(start), rows, width, pitch, rows * ((width + 63) / 64) / times + 1};
}

// out[count][rows] (pitch numbers apart) = the transpose of sums[rows][count]; rows up to 16, or several times 16.
template <class Y>
VITFAST_INLINE void store_transposed(const float* sums, int64_t rows, int64_t count, Y* out, int64_t pitch) {
    for (int64_t i = 0; i < rows; i += kTile) {
        for (int64_t j = 0; j < count; j += kTile) {
            Vec block[kTile];
#pragma GCC unroll 16
            for (int64_t r = 0; r < kTile; ++r) block[r] = load(sums + (i + r) * kSumsRow + j);
            transpose(block);
            for (int64_t c = 0; c < kTile && j + c < count; ++c) store(out + (j + c) * pitch + i, block[c], rows - i);
        }
    }
}

// A block's rows become outputs, and where those will be written: row by row, transposed, or in the tiles' order.
template <class P>
VITFAST_INLINE void finish_block(const P& a, const typename P::Sum* sums, int64_t row, int64_t rows, int64_t first,
                                 int64_t count) {
    finish_rows(a, sums, kSumsRow, row, rows, first, count);
}

template <class Y>
VITFAST_INLINE void finish_block(const Product<Y, Y>& a, const float* sums, int64_t row, int64_t rows, int64_t first,
                                 int64_t count) {
    if (a.out_transposed) return store_transposed(sums, rows, count, a.out + first * a.rows + row, a.rows);
    if constexpr (std::is_same_v<Y, bf16>) {
        if (a.in_tiles.out) {
            bf16* const out = a.in_tiles.out + place_in_tiles(row, first, a.outputs);
            return finish_rows(a, sums, kSumsRow, row, rows, first, count, out, kTileLines);
        }
    }
    finish_rows(a, sums, kSumsRow, row, rows, first, count);
}

// Of a matrix as wide as the outputs.
template <class P, class X>
Ahead block_ahead(const P& a, const X* x, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t times) {
    return rows_ahead(x + row * a.outputs + first, rows, count * sizeof(X), a.outputs * sizeof(X), times);
}

template <class P>
Ahead outputs_ahead(const P& a, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t times) {
    return block_ahead(a, a.out, row, rows, first, count, times);
}

template <class Y>
Ahead outputs_ahead(const Product<Y, Y>& a, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t times) {
    if (a.out_transposed) {
        return rows_ahead(a.out + first * a.rows + row, count, rows * sizeof(Y), a.rows * sizeof(Y), times);
    }
    if (!a.in_tiles.out) return block_ahead(a, a.out, row, rows, first, count, times);
    const bf16* const block = a.in_tiles.out + place_in_tiles(row, first, a.outputs);
    return rows_ahead(block, 1, kBlockSums * sizeof(bf16), 0, times);
}

// Rows that are finished in one go: more hold up the tiles, fewer cost calls. A step of fp32's parts is long enough for
// its share of the rows; a transposed tile is finished whole.
template <class P>
int64_t rows_at_once(const P& a) {
    if constexpr (std::is_same_v<typename P::Number, float>) return a.out_transposed ? kTile : 1;
    if constexpr (std::is_same_v<typename P::Number, bf16>) {
        if (a.out_transposed) return kTile;
    }
    return a.finish == Finish::kNone ? 8 : 4;
}
