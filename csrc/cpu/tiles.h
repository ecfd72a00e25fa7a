#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"

// How AMX's tiles hold packed operands of bf16 numbers, of fp32 ones, and of 8-bit integers (tile_pack.h).
// An fp32 number is the sum of three bf16 parts (3 x 8 bits of its 24), and of the nine products of two numbers' parts
// those six are made that are not below fp32's own rounding. The tiles do 14 times the multiply-adds of fp32's
// instruction, so six of them take half the time, with fp32's accuracy. What differs from fp32 arithmetic: an infinity,
// or a magnitude over 3.39e38, makes its results NaN, and parts below 2^-126 are 0.
namespace vitfast {

constexpr int64_t kTileLines = 32;  // rows, or columns, of a block of tiles
template <class Number>
constexpr int64_t kTileParts = std::is_same_v<Number, float> ? 3 : 1;
template <class Number>
constexpr int64_t kTileNumbers = std::is_same_v<Number, uint8_t> ? 64 : 32;  // of a step: 16 words of 2, or 4
template <class Number>
constexpr int64_t kTileStep = kTileParts<Number> * kTileLines * 16;  // words of a block's step

template <class Number>
int64_t tile_steps(int64_t inputs) {
    return (inputs + kTileNumbers<Number> - 1) / kTileNumbers<Number>;
}

inline int64_t tile_blocks(int64_t lines) { return (lines + kTileLines - 1) / kTileLines; }

// Words of a packed right operand.
template <class Number>
int64_t tile_words(int64_t inputs, int64_t outputs) {
    return tile_blocks(outputs) * tile_steps<Number>(inputs) * kTileStep<Number>;
}

// bf16 matrices [T, W] in the order in which AMX's tiles load a product's left operand, from one op to the next that
// reads it: [blocks of 32 rows][W / 32][32][32]. W is a multiple of 32.
struct TileRows {
    const bf16* x = nullptr;
    bf16* out = nullptr;
};

// Where a row's number of a column lies. The row's next ones follow it up to a multiple of 32; the next row's are 32
// numbers on, up to the block's end.
inline int64_t place_in_tiles(int64_t row, int64_t column, int64_t width) {
    const int64_t block = row / kTileLines * kTileLines * width, step = column / kTileLines * kTileLines * kTileLines;
    return block + step + row % kTileLines * kTileLines + column % kTileLines;
}

// Whether products are made by tiles: on a CPU that has them.
inline bool has_tiles() { return cpu_capability() == Capability::kAmx; }

}  // namespace vitfast
