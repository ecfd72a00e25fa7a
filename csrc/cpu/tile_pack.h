// Operands of products by AMX's tiles. A packed block of 32 lines (rows of the left operand, columns of the right one):
// [step][part][two tiles][16][16 words]. A tile's rows are, on the left, lines; on the right, words of a step.
// Included by kernels after gemm.h.

constexpr int64_t kTileWords = kTile * kTile;
constexpr int64_t kPartWords = 2 * kTileWords;

// Word i of a step holds which two of its 32 numbers? Of bf16 the neighbours 2 i and 2 i + 1, as they lie in memory; of
// fp32 the numbers i and i + 16, which are lanes of two vectors.
template <class Y>
struct Words;

template <>
struct Words<float> {
    static constexpr int64_t kFirst = 1, kSecond = kTile;  // numbers between words, and between a word's two

    // parts[i]: words of the i-th parts of two vectors of numbers.
    VITFAST_INLINE_MEMBER static void split(Vec low, Vec high, Vec parts[3]) {
        alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i interleave = _mm512_load_si512(kInterleave);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            const UVec words = (UVec)_mm512_permutexvar_epi16(interleave, rounded);
            parts[i] = (Vec)words;
            low -= (Vec)(words << 16);
            high -= (Vec)(words & 0xffff0000u);
        }
        parts[2] = (Vec)((UVec)low >> 16 | ((UVec)high & 0xffff0000u));  // 8 bits are left: nothing to round
    }

    // Of a line's next numbers.
    VITFAST_INLINE_MEMBER static void along(const float* from, int64_t numbers, Vec parts[3]) {
        split(load(from, numbers), numbers > kTile ? load(from + kTile, numbers - kTile) : Vec{}, parts);
    }

    // Of 16 lines' numbers `first` and `second`; null for zeros.
    VITFAST_INLINE_MEMBER static void across(const float* first, const float* second, int64_t lines, Vec parts[3]) {
        split(first ? load(first, lines) : Vec{}, second ? load(second, lines) : Vec{}, parts);
    }
};

template <>
struct Words<bf16> {
    static constexpr int64_t kFirst = 2, kSecond = 1;

    VITFAST_INLINE_MEMBER static void along(const bf16* from, int64_t numbers, Vec parts[1]) {
        parts[0] = load_row_words<true>(from, numbers);
    }

    VITFAST_INLINE_MEMBER static UVec bits(const bf16* from, int64_t lines) {
        HVec value{};
        if (from && lines > 0) __builtin_memcpy(&value, from, std::min<int64_t>(lines, kLanes) * sizeof(bf16));
        return widen(value);
    }

    VITFAST_INLINE_MEMBER static void across(const bf16* first, const bf16* second, int64_t lines, Vec parts[1]) {
        parts[0] = (Vec)(bits(first, lines) | bits(second, lines) << 16);
    }
};

template <>
struct Words<uint8_t> {  // of whole words, up to a row's end
    VITFAST_INLINE_MEMBER static void along(const uint8_t* from, int64_t numbers, Vec parts[1]) {
        alignas(64) uint8_t buffer[64] = {};
        if (numbers < 64) __builtin_memcpy(buffer, from, (numbers + 3) / 4 * 4);
        parts[0] = load_words(reinterpret_cast<const uint32_t*>(numbers < 64 ? buffer : from));
    }
};

// Two vectors of a line's numbers, as words of its step in a packed operand.
VITFAST_INLINE void store_parts(uint32_t* to, const Vec parts[3]) {
#pragma GCC unroll 3
    for (int p = 0; p < 3; ++p) store_words(to + p * kPartWords, parts[p]);
}

// A tile whose lines in memory are not its rows, of fp32: two blocks of numbers are turned, which is less than three of
// their parts.
template <bool kAlong>
void pack_turned(const float* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    alignas(64) uint32_t turned[2 * kTileWords], whole[2 * kTileWords];
    constexpr int64_t kStep = kTileNumbers<float>;
    if (lines < kTile || numbers < kStep) {  // filled up with zeros
        constexpr int64_t kRow = kAlong ? kStep : kTile;
        const int64_t rows = kAlong ? lines : numbers, width = kAlong ? numbers : lines;
        for (int64_t r = 0; r < 2 * kTileWords / kRow; ++r) {
            for (int64_t i = 0; i < kRow; i += kTile) {
                const Vec value = r < rows && i < width ? load(x + r * stride + i, width - i) : Vec{};
                store_words(whole + r * kRow + i, value);
            }
        }
        x = reinterpret_cast<const float*>(whole);
        stride = kRow;
    }
    const auto* const from = reinterpret_cast<const uint32_t*>(x);
    for (int64_t half = 0; half < 2; ++half) {
        transpose_block(from + half * kTile * (kAlong ? 1 : stride), stride, turned + half * kTileWords, kTile);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < kTile; ++i) {
        Vec parts[3];
        Words<float>::split(load_words(turned + i * kTile), load_words(turned + kTileWords + i * kTile), parts);
        store_parts(to + i * kTile, parts);
    }
}

// The tile of up to 16 lines of a step that has `numbers` more numbers. kAlong: a line's numbers are neighbours, lines
// are `stride` apart; else the other way round.
template <bool kAlong, bool kRight, class Y>
void pack_tile(const Y* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    constexpr bool kTranspose = kAlong == kRight;
    constexpr int kParts = kTileParts<Y>;
    alignas(64) uint32_t made[kParts * kTileWords];
    uint32_t* const rows = kTranspose ? made : to;
    constexpr int64_t kPitch = kTranspose ? kTileWords : kPartWords;
    const bool whole = lines >= kTile && numbers >= kTileNumbers<Y>;
    if constexpr (kTranspose && kParts > 1) return pack_turned<kAlong>(x, stride, lines, numbers, to);
#pragma GCC unroll 2
    for (int64_t i = 0; i < kTile; ++i) {
        Vec parts[kParts] = {};
        if constexpr (kAlong) {
            if (whole) {
                Words<Y>::along(x + i * stride, kTileNumbers<Y>, parts);
            } else if (i < lines) {
                Words<Y>::along(x + i * stride, numbers, parts);
            }
        } else {
            const int64_t first = i * Words<Y>::kFirst, second = first + Words<Y>::kSecond;
            if (whole) {
                __builtin_prefetch(x + (first + kTileNumbers<Y>)*stride);
                __builtin_prefetch(x + (second + kTileNumbers<Y>)*stride);
                Words<Y>::across(x + first * stride, x + second * stride, kTile, parts);
            } else {
                Words<Y>::across(first < numbers ? x + first * stride : nullptr,
                                 second < numbers ? x + second * stride : nullptr, lines, parts);
            }
        }
#pragma GCC unroll 3
        for (int p = 0; p < kParts; ++p) store_words(rows + p * kPitch + i * kTile, parts[p]);
    }
    if constexpr (kTranspose) {
        for (int p = 0; p < kParts; ++p) transpose_block(made + p * kTileWords, kTile, to + p * kPartWords, kTile);
    }
}

// Lines of an operand, in blocks of `steps` steps each; the left operand's rows past its last line stay as they are.
template <bool kAlong, bool kRight, class Y>
void pack_lines(const Y* x, int64_t stride, int64_t lines, int64_t numbers, uint32_t* to) {
    const int64_t steps = tile_steps<Y>(numbers), tiles = kRight ? tile_blocks(lines) * 2 : (lines + kTile - 1) / kTile;
    const auto pack = [&](int64_t tile, int64_t step) __attribute__((always_inline)) {
        const int64_t line = tile * kTile, number = step * kTileNumbers<Y>;
        pack_tile<kAlong, kRight>(x + (kAlong ? line * stride + number : number * stride + line), stride, lines - line,
                                  numbers - number,
                                  to + (tile / 2 * steps + step) * kTileStep<Y> + tile % 2 * kTileWords);
    };
    if (kAlong) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t next = std::min(lines, (tile + 2) * kTile);
            for (int64_t line = (tile + 1) * kTile; numbers <= kNarrowWidth && line < next; ++line) {
                prefetch_row(x + line * stride, numbers);
            }
            for (int64_t step = 0; step < steps; ++step) pack(tile, step);
        }
    } else {
        for (int64_t step = 0; step < steps; ++step) {
            for (int64_t tile = 0; tile < tiles; ++tile) pack(tile, step);
        }
    }
}
