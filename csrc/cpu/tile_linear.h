#pragma once

#include "int8_linear.h"
#include "linear.h"
#include "tiles.h"

// Products of linear layers by AMX's tiles: of bf16 numbers, of fp32 ones, and of 8-bit integers.
namespace vitfast {

// Number: float, bf16, or uint8_t where the left operand is of those (the right one is of int8_t, packed beforehand).
template <class Number>
void pack_tiles(const RightOperand<Number>& right, uint32_t* packed);

// P: Product or Int8Product. packed: the right operand.
template <class P>
void multiply_by_tiles(const P& args, const uint32_t* packed);

// Packs the right operand first, where that is not done yet.
template <class X, class Y>
void multiply_by_tiles(const Product<X, Y>& args, const RightOperand<Y>& right);

}  // namespace vitfast
