// Attention's products by AMX's tiles: 16 x 16 sums of 16 words, a word being two bf16 that are neighbours along the
// contracted axis. Linear layers have tile_linear_kernel.h. Included by gemm.h where VITFAST_AMX.
// Tiles 0 to 3: sums (0, 1: upper rows, left and right columns; 2, 3: lower rows). 4, 5: left operand, upper and lower
// rows. 6, 7: right operand, left and right columns.

constexpr int kTile = 16;             // rows of a tile, and words in each
constexpr int64_t kBlockHeight = 32;  // rows of a register block: two tiles
constexpr int64_t kBlockWidth = 32;   // and columns
constexpr int64_t kGroupWidth = 64;   // columns whose words stay in L1 while all rows pass:
constexpr int64_t kGroupWords = 128;  // 64 x 128 words = 32 KiB

// The intrinsics are opaque to the compiler, which may move loads and stores of the same memory past them.
VITFAST_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

// Tile shapes of a register block with `rows` rows; 0 to give the tiles back.
VITFAST_INLINE void configure_tiles(int64_t rows) {
    settle_memory();
    if (rows == 0) return _tile_release();
    struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } shape;
    const int64_t upper = std::min<int64_t>(rows, kTile), lower = std::max<int64_t>(rows - kTile, 1);
    const int64_t heights[8] = {upper, upper, lower, lower, upper, lower, kTile, kTile};
    for (int i = 0; i < 8; ++i) {
        shape.row_bytes[i] = 64;
        shape.rows[i] = static_cast<uint8_t>(heights[i]);
    }
    _tile_loadconfig(&shape);
}

// The sums in tiles 0 to 3 become those at c (pitch in bytes) if they are added to, else 0.
template <bool kLower, bool kRight>
VITFAST_INLINE void begin_sums(void* c, int64_t pitch, bool add) {
    char *const upper = static_cast<char*>(c), *const lower = upper + kTile * pitch;
    settle_memory();
    if (add) {
        _tile_loadd(0, upper, pitch);
        if constexpr (kRight) _tile_loadd(1, upper + 64, pitch);
        if constexpr (kLower) _tile_loadd(2, lower, pitch);
        if constexpr (kLower && kRight) _tile_loadd(3, lower + 64, pitch);
    } else {
        _tile_zero(0);
        if constexpr (kRight) _tile_zero(1);
        if constexpr (kLower) _tile_zero(2);
        if constexpr (kLower && kRight) _tile_zero(3);
    }
}

template <bool kLower, bool kRight>
VITFAST_INLINE void store_sums(void* c, int64_t pitch) {
    char *const upper = static_cast<char*>(c), *const lower = upper + kTile * pitch;
    _tile_stored(0, upper, pitch);
    if constexpr (kRight) _tile_stored(1, upper + 64, pitch);
    if constexpr (kLower) _tile_stored(2, lower, pitch);
    if constexpr (kLower && kRight) _tile_stored(3, lower + 64, pitch);
    settle_memory();
}

// C[rows, 16 or (kRight) 32 columns] = (or +=) A * B over `words` words, a multiple of 16. Pitches in bytes. kLower:
// more than 16 rows.
template <bool kLower, bool kRight>
VITFAST_INLINE void multiply_block(const uint32_t* a, int64_t a_pitch, const uint32_t* b, int64_t b_pitch,
                                   int64_t words, void* c, int64_t c_pitch, bool add) {
    const char *a_upper = reinterpret_cast<const char*>(a), *a_lower = a_upper + kTile * a_pitch;
    const char* b_left = reinterpret_cast<const char*>(b);
    begin_sums<kLower, kRight>(c, c_pitch, add);
    for (int64_t k = 0; k < words; k += kTile) {
        _tile_loadd(6, b_left, b_pitch);
        _tile_loadd(4, a_upper, a_pitch);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kRight) {
            _tile_loadd(7, b_left + 64, b_pitch);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kLower) {
            _tile_loadd(5, a_lower, a_pitch);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (kRight) {
                _tile_dpbf16ps(3, 5, 7);
            }
        }
        a_upper += 64;
        a_lower += 64;
        b_left += kTile * b_pitch;
    }
    store_sums<kLower, kRight>(c, c_pitch);
}

// The same for `columns` columns, a multiple of 16; rows as configured.
inline void multiply_block_row(int64_t rows, const uint32_t* a, int64_t a_pitch, const uint32_t* b, int64_t b_pitch,
                               int64_t columns, int64_t words, void* c, int64_t c_pitch, bool add) {
    for (int64_t j = 0; j < columns; j += kBlockWidth) {
        char* const to = static_cast<char*>(c) + j * 4;
        const bool right = columns - j > kTile;
        if (rows > kTile && right) {
            multiply_block<true, true>(a, a_pitch, b + j, b_pitch, words, to, c_pitch, add);
        } else if (rows > kTile) {
            multiply_block<true, false>(a, a_pitch, b + j, b_pitch, words, to, c_pitch, add);
        } else if (right) {
            multiply_block<false, true>(a, a_pitch, b + j, b_pitch, words, to, c_pitch, add);
        } else {
            multiply_block<false, false>(a, a_pitch, b + j, b_pitch, words, to, c_pitch, add);
        }
    }
}

// Rows of A with the given words side by side, and zeros up to a multiple of 16 words: where they are to be had in rows
// of another pitch, or (word stride over 1, row stride 1) in columns, which are then read 16 at a time.
VITFAST_INLINE void gather_rows(Operand a, int64_t rows, int64_t words, uint32_t* to, int64_t pitch) {
    for (int64_t w = 0; w < words; w += kTile) {
        for (int64_t m = 0; a.word == 1 && m < rows; ++m) {
            const Vec part = load(reinterpret_cast<const float*>(a.data + m * a.row + w), words - w);
            store_words(to + m * pitch + w, part);
        }
        for (int64_t m = 0; a.word != 1 && m < rows; m += kTile) {
            Vec block[kTile];
#pragma GCC unroll 16
            for (int i = 0; i < kTile; ++i) {
                block[i] = w + i < words ? load_words(a.data + m + (w + i) * a.word) : Vec{};
            }
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < kTile; ++i) store_words(to + (m + i) * pitch + w, block[i]);
        }
    }
}

// C[rows, columns] = (or +=) A[rows, words] * panel[words, pitch]; columns is a multiple of 16. configured: for how
// many rows the tiles are configured, 0 at first; who passes it gives them back.
inline void multiply_tiles(Operand a, const uint32_t* panel, int64_t pitch, int64_t rows, int64_t columns,
                           int64_t words, float* c, int64_t c_row, bool add, int64_t* configured) {
    alignas(64) uint32_t left[kBlockHeight * kGroupWords], right[kTile * kGroupWidth];
    for (int64_t k = 0; k < words; k += kGroupWords) {
        const int64_t depth = std::min(words - k, kGroupWords), whole = depth / kTile * kTile, rest = depth - whole;
        const uint32_t* const from = panel + k * pitch;
        for (int64_t j = 0; j < columns; j += kGroupWidth) {
            const int64_t width = std::min(columns - j, kGroupWidth);
            for (int64_t r = 0; rest > 0 && r < kTile; ++r) {
                for (int64_t i = 0; i < width; i += kTile) {
                    const Vec words_of_row = r < rest ? load_words(from + (whole + r) * pitch + j + i) : Vec{};
                    store_words(right + r * kGroupWidth + i, words_of_row);
                }
            }
            for (int64_t m = 0; m < rows; m += kBlockHeight) {
                const int64_t height = std::min(rows - m, kBlockHeight);
                if (*configured != height) configure_tiles(*configured = height);
                Operand part{a.data + m * a.row + k * a.word, a.row, a.word};
                const uint32_t* tail = left;
                if (a.word != 1) {
                    gather_rows(part, height, depth, left, kGroupWords);
                    part = {left, kGroupWords, 1};
                    tail = left + whole;
                } else if (rest > 0) {
                    gather_rows({part.data + whole, part.row, 1}, height, rest, left, kGroupWords);
                }
                float* const to = c + m * c_row + j;
                bool sum = add || k > 0;
                if (whole > 0) {
                    multiply_block_row(height, part.data, part.row * 4, from + j, pitch * 4, width, whole, to,
                                       c_row * 4, sum);
                    sum = true;
                }
                if (rest > 0) {
                    multiply_block_row(height, tail, kGroupWords * 4, right, kGroupWidth * 4, width, kTile, to,
                                       c_row * 4, sum);
                }
            }
        }
    }
}
