// Small products for attention, and the packing of their operands. Included by attention_*_kernel.h after vec.h.
// Operands are 32-bit words: one fp32 number, or (kPairs) two bf16 that are neighbours along the contracted axis, for
// the dot-product instruction of avx512_bf16; other instruction sets widen them. A "panel" is an operand
// [words][columns] whose columns are padded with zeros to whole vectors.

constexpr int kTileRows = VITFAST_LEVEL >= 2 ? 6 : 4;
constexpr int kTileVecs = VITFAST_LEVEL >= 2 ? 4 : VITFAST_LEVEL == 1 ? 3 : 2;
constexpr int64_t kTileDepth = 96;  // words of a panel kept in L1 while the rows of A pass: 96 x 64 columns = 24 KiB

template <bool kPairs>
VITFAST_INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if VITFAST_LEVEL >= 3
    if constexpr (kPairs) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    if constexpr (kPairs) {
        const Vec first = fma((Vec)((UVec)a << 16), (Vec)((UVec)b << 16), sum);
        return fma((Vec)((UVec)a & 0xffff0000u), (Vec)((UVec)b & 0xffff0000u), first);
    }
    return fma(a, b, sum);
}

VITFAST_INLINE Vec load_words(const uint32_t* from) {
    Vec value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

VITFAST_INLINE void store_words(uint32_t* to, Vec value) { __builtin_memcpy(to, &value, sizeof(value)); }

VITFAST_INLINE Vec broadcast_word(const uint32_t* from) {
    uint32_t word;
    __builtin_memcpy(&word, from, sizeof(word));
    return (Vec)(UVec{} + word);
}

// An operand read one word at a time: word k of row m is at data[m * row + k * word].
struct Operand {
    const uint32_t* data;
    int64_t row, word;
};

// Memory that the next product will read, brought into L2 a few cache lines at a time while this one computes.
struct Ahead {
    const char* row;
    int64_t rows, width, pitch;  // width and pitch in bytes
    int64_t lines;               // each time
    int64_t at = 0;

    template <bool kToWrite = false>
    VITFAST_INLINE_MEMBER void fetch() {
        for (int64_t i = 0; i < lines && rows > 0; ++i) {
            __builtin_prefetch(row + at, kToWrite, kToWrite ? 3 : 2);
            at += 64;
            if (at < width) continue;
            at = 0;
            row += pitch;
            --rows;
        }
    }
};

constexpr int64_t kSumWords = 512;   // words of the contracted axis that are summed in registers
constexpr int64_t kAheadWords = 32;  // words of the contracted axis between two fetches

// C[M, N vectors] = (or +=) A[M, words] * panel. Sums of kSumWords products are made in registers and added up in C: in
// one go, rounding would grow with the length.
template <bool kPairs, int M, int N>
void multiply_tile(Operand a, const uint32_t* panel, int64_t columns, int64_t words, float* c, int64_t c_row, bool add,
                   Ahead* ahead) {
    int64_t k = 0;
    do {
        const int64_t end = std::min(words, k + kSumWords);
        Vec sum[M][N] = {};
        while (k < end) {
            if (ahead) ahead->fetch();
            for (const int64_t last = std::min(end, k + kAheadWords); k < last; ++k) {
                Vec b[N];
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) b[n] = load_words(panel + k * columns + n * kLanes);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const Vec value = broadcast_word(a.data + m * a.row + k * a.word);
#pragma GCC unroll 4
                    for (int n = 0; n < N; ++n) sum[m][n] = multiply_add<kPairs>(value, b[n], sum[m][n]);
                }
            }
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                float* const to = c + m * c_row + n * kLanes;
                store(to, add ? load(to) + sum[m][n] : sum[m][n]);
            }
        }
        add = true;
    } while (k < words);
}

template <bool kPairs, int N>
VITFAST_INLINE void multiply_rows(int rows, Operand a, const uint32_t* panel, int64_t columns, int64_t words, float* c,
                                  int64_t c_row, bool add, Ahead* ahead = nullptr) {
    switch (rows) {
        case 1:
            return multiply_tile<kPairs, 1, N>(a, panel, columns, words, c, c_row, add, ahead);
        case 2:
            return multiply_tile<kPairs, 2, N>(a, panel, columns, words, c, c_row, add, ahead);
        case 3:
            return multiply_tile<kPairs, 3, N>(a, panel, columns, words, c, c_row, add, ahead);
        case 4:
            return multiply_tile<kPairs, 4, N>(a, panel, columns, words, c, c_row, add, ahead);
#if VITFAST_LEVEL >= 2
        case 5:
            return multiply_tile<kPairs, 5, N>(a, panel, columns, words, c, c_row, add, ahead);
        case 6:
            return multiply_tile<kPairs, 6, N>(a, panel, columns, words, c, c_row, add, ahead);
#endif
    }
}

// Transposes a kLanes x kLanes block in registers: log2(kLanes) rounds of interleaving row i with row i + kLanes / 2.
VITFAST_INLINE void transpose(Vec rows[kLanes]) {
    IVec low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i / 2 + (i % 2) * kLanes;
        high[i] = low[i] + kLanes / 2;
    }
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
        Vec next[kLanes];
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
            next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

#if VITFAST_AMX
#include "amx_tiles.h"
#endif

// C[rows, columns] = (or +=) A[rows, words] * panel[words, columns]; columns is a multiple of kLanes.
template <bool kPairs>
void multiply(Operand a, const uint32_t* panel, int64_t rows, int64_t columns, int64_t words, float* c, int64_t c_row,
              bool add) {
#if VITFAST_AMX
    if constexpr (kPairs) {
        int64_t configured = 0;
        multiply_tiles(a, panel, columns, rows, columns, words, c, c_row, add, &configured);
        return configure_tiles(0);
    }
#endif
    const int64_t depth_blocks = (words + kTileDepth - 1) / kTileDepth;
    const int64_t vectors = columns / kLanes, tiles = (vectors + kTileVecs - 1) / kTileVecs;
    const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    for (int64_t block = 0; block < depth_blocks; ++block) {
        const int64_t first = words * block / depth_blocks, last = words * (block + 1) / depth_blocks;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t v = vectors * tile / tiles, width = vectors * (tile + 1) / tiles - v;
            const uint32_t* const b = panel + first * columns + v * kLanes;
            for (int64_t row_tile = 0; row_tile < row_tiles; ++row_tile) {
                const int64_t m = rows * row_tile / row_tiles;
                const int height = static_cast<int>(rows * (row_tile + 1) / row_tiles - m);
                const Operand part{a.data + m * a.row + first * a.word, a.row, a.word};
                float* const out = c + m * c_row + v * kLanes;
                const bool accumulate = add || block > 0;
                switch (width) {
                    case 1:
                        multiply_rows<kPairs, 1>(height, part, b, columns, last - first, out, c_row, accumulate);
                        break;
                    case 2:
                        multiply_rows<kPairs, 2>(height, part, b, columns, last - first, out, c_row, accumulate);
                        break;
#if VITFAST_LEVEL >= 1
                    case 3:
                        multiply_rows<kPairs, 3>(height, part, b, columns, last - first, out, c_row, accumulate);
                        break;
#endif
#if VITFAST_LEVEL >= 2
                    case 4:
                        multiply_rows<kPairs, 4>(height, part, b, columns, last - first, out, c_row, accumulate);
                        break;
#endif
                }
            }
        }
    }
}

// Words that hold `count` numbers along the contracted axis.
template <bool kPairs>
constexpr int64_t words_for(int64_t count) {
    return kPairs ? (count + 1) / 2 : count;
}

// Rows of one head lie far apart in the packed qkv: their cache lines are asked for some rows ahead.
template <class T>
VITFAST_INLINE void prefetch_row(const T* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(row + i);
}

template <class T>
VITFAST_INLINE void prefetch_row_to_write(const T* row, int64_t width) {
    for (int64_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 1);
}

constexpr int64_t kPrefetchRows = 12;
constexpr int64_t kPrefetchBlocks = 4;  // in rows too wide for several of them to stay in L1
constexpr int64_t kNarrowWidth = 256;

// kLanes words of a row that has n more numbers; 0 past its end.
template <bool kPairs, class T>
VITFAST_INLINE Vec load_row_words(const T* from, int64_t n) {
    if constexpr (kPairs) {
        uint32_t buffer[kLanes] = {};
        if (__builtin_expect(n >= 2 * kLanes, 1)) return load_words(reinterpret_cast<const uint32_t*>(from));
        __builtin_memcpy(buffer, from, n * sizeof(bf16));
        return load_words(buffer);
    } else {
        return load(from, n);
    }
}

// Rows x[rows, width] (row_stride elements apart) to words[rows][words_for(width)].
template <bool kPairs, class T>
void pack_rows(const T* x, int64_t row_stride, int64_t rows, int64_t width, uint32_t* words) {
    const int64_t pitch = words_for<kPairs>(width);
    for (int64_t r = 0; r < rows; ++r) {
        if (r + kPrefetchRows < rows) prefetch_row(x + (r + kPrefetchRows) * row_stride, width);
        if constexpr (kPairs) {
            for (int64_t w = 0; w < pitch; w += kLanes) {
                const Vec block = load_row_words<true>(x + r * row_stride + 2 * w, width - 2 * w);
                store(reinterpret_cast<float*>(words + r * pitch + w), block, pitch - w);
            }
        } else {
            float* const to = reinterpret_cast<float*>(words + r * pitch);
            for (int64_t i = 0; i < width; i += kLanes)
                store(to + i, load(x + r * row_stride + i, width - i), width - i);
        }
    }
}

// x[rows, width] as the left operand of a product: in place where its numbers are words already, else packed.
template <bool kPairs, class T>
Operand row_operand(const T* x, int64_t row_stride, int64_t rows, int64_t width, uint32_t* scratch) {
    if constexpr (std::is_same_v<T, float>) {
        return {reinterpret_cast<const uint32_t*>(x), row_stride, 1};
    } else if (kPairs && width % 2 == 0 && row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0) {
        return {reinterpret_cast<const uint32_t*>(x), row_stride / 2, 1};
    }
    pack_rows<kPairs>(x, row_stride, rows, width, scratch);
    return {scratch, words_for<kPairs>(width), 1};
}

#if VITFAST_LEVEL >= 2
// Transposes 16 rows of 16 words from memory to memory. Rows i, i + 4, i + 8 and i + 12 are loaded into the quarters of
// one vector, which leaves the transposition of 4 x 4 words inside the quarters.
VITFAST_INLINE void transpose_block(const uint32_t* from, int64_t row, uint32_t* to, int64_t to_row) {
    for (int c = 0; c < kLanes; c += 4) {
        __m512 rows[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const float* const start = reinterpret_cast<const float*>(from) + i * row + c;
            rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(start));
            rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(start + 4 * row), 1);
            rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(start + 8 * row), 2);
            rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(start + 12 * row), 3);
        }
        const __m512d low01 = (__m512d)_mm512_unpacklo_ps(rows[0], rows[1]);
        const __m512d low23 = (__m512d)_mm512_unpacklo_ps(rows[2], rows[3]);
        const __m512d high01 = (__m512d)_mm512_unpackhi_ps(rows[0], rows[1]);
        const __m512d high23 = (__m512d)_mm512_unpackhi_ps(rows[2], rows[3]);
        store_words(to + c * to_row, (Vec)_mm512_unpacklo_pd(low01, low23));
        store_words(to + (c + 1) * to_row, (Vec)_mm512_unpackhi_pd(low01, low23));
        store_words(to + (c + 2) * to_row, (Vec)_mm512_unpacklo_pd(high01, high23));
        store_words(to + (c + 3) * to_row, (Vec)_mm512_unpackhi_pd(high01, high23));
    }
}
#endif

// Rows x[rows, width] to the panel [words_for(width)][columns], columns being rows or more, rounded to whole vectors:
// for products over the width.
template <bool kPairs, class T>
void transposed_panel(const T* x, int64_t row_stride, int64_t rows, int64_t width, int64_t columns, uint32_t* panel) {
    constexpr int64_t kPerWord = kPairs ? 2 : 1;
    const int64_t words = words_for<kPairs>(width);
    const bool narrow = width <= kNarrowWidth;
    for (int64_t r = 0; r < columns; r += kLanes) {
        for (int64_t i = r + kLanes; narrow && i < std::min(rows, r + 2 * kLanes); ++i) {
            prefetch_row(x + i * row_stride, width);
        }
        for (int64_t w = 0; w < words; w += kLanes) {
            for (int64_t i = r; !narrow && i < std::min(rows, r + kLanes); ++i) {
                __builtin_prefetch(x + i * row_stride + (w + kPrefetchBlocks * kLanes) * kPerWord);
            }
#if VITFAST_LEVEL >= 2
            if constexpr (sizeof(T) * kPerWord == sizeof(uint32_t)) {
                if (r + kLanes <= rows && (w + kLanes) * kPerWord <= width && row_stride % kPerWord == 0) {
                    const auto* const from = reinterpret_cast<const uint32_t*>(x + r * row_stride) + w;
                    transpose_block(from, row_stride / kPerWord, panel + w * columns + r, columns);
                    continue;
                }
            }
#endif
            Vec block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const T* const from = x + (r + i) * row_stride + w * kPerWord;
                block[i] = r + i < rows ? load_row_words<kPairs>(from, width - w * kPerWord) : Vec{};
            }
            transpose(block);
            for (int i = 0; i < kLanes && w + i < words; ++i) store_words(panel + (w + i) * columns + r, block[i]);
        }
    }
}

// Two rows of fp32 vectors as one vector of bf16 pairs (first: low half).
VITFAST_INLINE Vec pair_words(Vec first, Vec second) {
    const UVec low = widen(to_bf16_bits(first));
    const UVec high = widen(to_bf16_bits(second));
    return (Vec)(low | (high << 16));
}

// Rows x[rows, width] to the panel [words_for(rows)][columns], columns being width or more, rounded to whole vectors:
// for products over the rows.
template <bool kPairs, class T>
void row_panel(const T* x, int64_t row_stride, int64_t rows, int64_t width, int64_t columns, uint32_t* panel) {
    constexpr int64_t kRowsPerWord = kPairs ? 2 : 1;
    for (int64_t w = 0; w < words_for<kPairs>(rows); ++w) {
        for (int64_t r = w * kRowsPerWord + kPrefetchRows; r < std::min(rows, (w + 1) * kRowsPerWord + kPrefetchRows);
             ++r) {
            prefetch_row(x + r * row_stride, width);
        }
        for (int64_t i = 0; i < columns; i += kLanes) {
            uint32_t* const to = panel + w * columns + i;
            if constexpr (kPairs) {
                const T* const from = x + 2 * w * row_stride + i;
                const Vec second = 2 * w + 1 < rows ? load(from + row_stride, width - i) : Vec{};
                store_words(to, pair_words(load(from, width - i), second));
            } else {
                store_words(to, load(x + w * row_stride + i, width - i));
            }
        }
    }
}
