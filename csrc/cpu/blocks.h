#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "attention_heads.h"
#include "check.h"
#include "forward.h"
#include "scratch.h"

// What whole blocks at inference share, in floats (halves.cpp) and in 8-bit integers (int8_halves.cpp). Shapes: B
// images, T rows, D width, H heads, E head dim.
namespace vitfast {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kBFloat16 = ScalarType::BFloat16;

// A tensor that lives during one call only.
class Temporary {
  public:
    // spare: bytes behind it
    Temporary(std::initializer_list<int64_t> shape, ScalarType dtype, int64_t spare = 0)
        : memory_(count(shape) * (dtype == kFloat ? 4 : 2) + spare), tensor_(view(memory_.data(), shape, dtype)) {}

    const Tensor& operator*() const { return tensor_; }

  private:
    static int64_t count(std::initializer_list<int64_t> shape) {
        int64_t product = 1;
        for (const int64_t size : shape) product *= size;
        return std::max<int64_t>(product, 1);
    }

    static Tensor view(void* data, std::initializer_list<int64_t> shape, ScalarType dtype) {
        std::vector<int64_t> strides(shape.size());
        int64_t stride = 1;
        for (size_t axis = shape.size(); axis-- > 0; stride *= shape.begin()[axis]) strides[axis] = stride;
        const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
        return torch::stable::from_blob(data, {shape.begin(), shape.size()}, {strides.data(), strides.size()}, cpu,
                                        dtype);
    }

    KeptMemory memory_;
    Tensor tensor_;
};

// A vector of bf16 numbers as fp32, in `wide`.
inline Tensor as_float(const char* name, const Tensor& x, const Temporary& wide) {
    check(name, x, Device::kCpu, {kFloat, kBFloat16}, {(*wide).size(0)});
    if (x.scalar_type() == kFloat) return x;
    const uint16_t* const from = data<uint16_t>(x);
    uint32_t* const to = mutable_data<uint32_t>(*wide);
    for (int64_t i = 0; i < x.size(0); ++i) to[i] = static_cast<uint32_t>(from[i]) << 16;
    return *wide;
}

inline int64_t head_dim_of(int64_t outputs, int64_t heads) {
    if (heads < 1 || outputs == 0 || outputs % (3 * heads) != 0 || outputs > 3 * heads * kMostHeadDim) {
        fail("qkv_weight has ", outputs, " rows; needed: a multiple of 3 * ", heads, " (heads), at most ", kMostHeadDim,
             " times");
    }
    return outputs / (3 * heads);
}

// Rotary tables of the last tokens of each sequence, or none (HeadOptions).
struct Rotation {
    OptionalTensor cos, sin;
    bool interleaved = false;
};

// out[T, H * E] = attention of qkv[T, 3, H, E], in the order of TileRows with in_tiles.
inline void attend(const Tensor& qkv, double scale, const Rotation& rotation, const Tensor& cu_seqlens,
                   int64_t max_seqlen, const Tensor& out, bool in_tiles = false) {
    const int64_t rows = qkv.size(0), heads = qkv.size(2);
    const Temporary lse({heads, rows}, kFloat);
    attention_forward(qkv, scale, {}, {}, rotation.cos, rotation.sin, rotation.interleaved, "", "", {}, {}, {}, {}, 0.0,
                      0.0, cu_seqlens, max_seqlen, torch::stable::view(out, {rows, heads, qkv.size(3)}), *lse,
                      in_tiles);
}

// Rows [first, first + count) of x.
inline Tensor narrow(Tensor x, int64_t first, int64_t count) { return torch::stable::narrow(x, 0, first, count); }

// to[B, D] = the first of every L rows of from[B * L, D].
inline void first_rows(const Tensor& from, int64_t length, const Temporary& to) {
    const int64_t bytes = from.size(1) * (from.scalar_type() == kFloat ? 4 : 2);
    for (int64_t i = 0; i < (*to).size(0); ++i) {
        std::memcpy(static_cast<char*>((*to).mutable_data_ptr()) + i * bytes,
                    static_cast<const char*>(from.const_data_ptr()) + i * length * bytes, bytes);
    }
}

// The tables of keys for a first token that does not turn itself.
inline HeadOptions turns_of(const Rotation& rotation, int64_t rows, int64_t length, int64_t head_dim) {
    const HeadOptions turns = check_heads(
        {rotation.cos, rotation.sin, rotation.interleaved, "", "", {}, {}, {}, {}, 0.0, 0.0}, rows, head_dim);
    if (turns.rotated >= length) {
        fail("first_token needs a first token that does not turn; cos has ", turns.rotated, " rows for ", length,
             " tokens");
    }
    return turns;
}

// The parameters of one block, as the operator is given them one after the other; an empty tensor stands for none.
struct BlockParameters {
    const Tensor* at;

    const Tensor& get(size_t i) const { return at[i]; }
    OptionalTensor maybe(size_t i) const { return at[i].numel() == 0 ? OptionalTensor() : OptionalTensor(at[i]); }
};

// out = the blocks one after the other. out is [T, D], or, with first_token, [B, D]: the first of every L = max_seqlen
// rows alone, and the last block makes no others. Calls block(from[T, D], parameters, middle[T, D], to[T, D]), and
// last(from[T, D], parameters, to[B, D]).
template <class Block, class Last>
void run_blocks(const Tensor& x, const std::vector<Tensor>& parameters, size_t each, const Tensor& cu_seqlens,
                int64_t max_seqlen, bool first_token, const Tensor& out, const Block& block, const Last& last) {
    check("x", x, Device::kCpu, {kFloat, kBFloat16}, {-1, -1});
    const int64_t rows = x.size(0), width = x.size(1), images = cu_seqlens.numel() - 1;
    check("out", out, Device::kCpu, {x.scalar_type()}, {first_token ? images : rows, width});
    if (parameters.empty() || parameters.size() % each != 0) {
        fail("parameters has ", parameters.size(), " tensors; needed: ", each, " for each block");
    }
    if (first_token && (max_seqlen < 1 || images * max_seqlen != rows)) {
        fail("first_token needs images of max_seqlen rows, at least one; x has ", rows, " rows, cu_seqlens ", images,
             " images, max_seqlen is ", max_seqlen);
    }
    const size_t whole = parameters.size() / each - first_token;
    const Temporary middle({rows, width}, x.scalar_type()), stream({first_token ? rows : 0, width}, x.scalar_type());
    const Tensor& made = first_token ? *stream : out;
    for (size_t i = 0; i < whole; ++i) {
        block(i == 0 ? x : made, BlockParameters{parameters.data() + i * each}, *middle, made);
    }
    if (first_token) last(whole == 0 ? x : made, BlockParameters{parameters.data() + whole * each}, out);
}

// A gated product joins columns that it computes apart.
inline bool is_gated(const std::string& activation) { return activation == "swiglu"; }

}  // namespace vitfast
