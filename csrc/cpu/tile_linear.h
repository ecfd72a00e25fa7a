#pragma once

#include <type_traits>

#include "linear.h"

// Products of linear layers by AMX's tiles of bf16, of bf16 numbers and of fp32 ones.
// An fp32 number is the sum of three bf16 parts (3 x 8 bits of its 24), and of the nine products of two numbers' parts
// those six are made that are not below fp32's own rounding. The tiles do 14 times the multiply-adds of fp32's
// instruction, so six of them take half the time, with fp32's accuracy. What differs from fp32 arithmetic: an infinity,
// or a magnitude over 3.39e38, makes its results NaN, and parts below 2^-126 are 0.
namespace vitfast {

template <class Y>
constexpr int64_t kTileParts = std::is_same_v<Y, float> ? 3 : 1;
constexpr int64_t kTileLines = 32;    // rows of the left operand, or columns of the right one, that are packed together
constexpr int64_t kTileNumbers = 32;  // along the contracted axis: a step, 16 words of two numbers
template <class Y>
constexpr int64_t kTileStep = kTileParts<Y> * kTileLines * kTileNumbers / 2;  // words of a block's step

inline int64_t tile_steps(int64_t inputs) { return (inputs + kTileNumbers - 1) / kTileNumbers; }

inline int64_t tile_blocks(int64_t lines) { return (lines + kTileLines - 1) / kTileLines; }

// Words of a packed right operand.
template <class Y>
int64_t tile_words(int64_t inputs, int64_t outputs) {
    return tile_blocks(outputs) * tile_steps(inputs) * kTileStep<Y>;
}

// Whether products are made by tiles: on a CPU that has them.
inline bool has_tiles() { return cpu_capability() == Capability::kAmx; }

template <class Y>
void pack_tiles(const RightOperand<Y>& right, uint32_t* packed);

template <class X, class Y>
void multiply_by_tiles(const Product<X, Y>& args, const RightOperand<Y>& right);

}  // namespace vitfast
