#pragma once

#include "linear.h"

// Products of fp32 numbers by AMX's tiles of bf16. A number is the sum of three bf16 parts (3 x 8 bits of its 24), and
// of the nine products of two numbers' parts, those six are made that are not below fp32's rounding. The tiles do 14
// times the multiply-adds of fp32's instruction, so six of them take less than half the time, with fp32's accuracy.
// What differs from fp32 arithmetic: an infinity, or a magnitude over 3.39e38, makes its results NaN, and parts below
// 2^-126 are 0.
namespace vitfast {

constexpr int64_t kSplitParts = 3;
constexpr int64_t kSplitLines = 32;  // rows of the left operand, or columns of the right one, that are packed together
constexpr int64_t kSplitNumbers = 32;  // along the contracted axis: a step, 16 words of two numbers
constexpr int64_t kSplitStepWords = kSplitParts * kSplitLines * kSplitNumbers / 2;

inline int64_t split_steps(int64_t inputs) { return (inputs + kSplitNumbers - 1) / kSplitNumbers; }

inline int64_t split_blocks(int64_t lines) { return (lines + kSplitLines - 1) / kSplitLines; }

// Whether products are made this way: of float operands, on a CPU that has the tiles.
template <class Y>
bool splits() {
    return std::is_same_v<Y, float> && cpu_capability() == Capability::kAmx;
}

// Words of a packed right operand.
inline int64_t split_words(int64_t inputs, int64_t outputs) {
    return split_blocks(outputs) * split_steps(inputs) * kSplitStepWords;
}

void pack_split(const RightOperand<float>& right, uint32_t* packed);

void multiply_split(const Product<float, float>& args, const RightOperand<float>& right);

}  // namespace vitfast
