#pragma once

#include <cstdint>
#include <vector>

#include "attention_heads.h"
#include "check.h"
#include "isa.h"
#include "scratch.h"
#include "tiles.h"

// What attention's forward and backward share. Shapes: T rows of all sequences together, S sequences, H heads,
// E head dim, L = max_seqlen.
namespace vitfast {

// The additive bias [Bb, Hb, L, L], Bb in {1, S}, Hb in {1, H}; at most one of the pointers is set.
struct AttentionBias {
    const float* as_float = nullptr;
    const bf16* as_bf16 = nullptr;
    int64_t batches = 1, heads = 1, length = 0;

    int64_t slice(int64_t sequence, int64_t head) const {
        return (batches == 1 ? 0 : sequence) * heads + (heads == 1 ? 0 : head);
    }
};

// Keys that no query sees: non-zero bytes of [S, max_seqlen], or null.
struct KeyPadding {
    const uint8_t* mask = nullptr;
    int64_t length = 0;

    const uint8_t* row(int64_t sequence) const { return mask ? mask + sequence * length : nullptr; }
};

// Where one (sequence, head) finds its rows in qkv[T, 3, H, E], out[T, H, E] and lse[H, T].
struct HeadOfSequence {
    int64_t sequence, head, start, length;
    int64_t index;  // of this one among all of a call
};

template <class Y>
struct AttentionForward {
    const Y* qkv;
    AttentionBias bias;
    KeyPadding padding;
    HeadOptions options;
    Y* out;
    float* lse;
    float scale;
    int64_t rows, heads, head_dim;
    bool in_tiles;  // out is in the order of TileRows; E is then a multiple of 16

    // Where a row's output of a head begins from number e on.
    Y* place(int64_t row, int64_t head, int64_t e) const {
        const int64_t column = head * head_dim + e, width = heads * head_dim;
        return out + (in_tiles ? place_in_tiles(row, column, width) : row * width + column);
    }
};

template <class Y>
struct AttentionBackward {
    const Y *d_out, *qkv, *out;
    const float* lse;
    AttentionBias bias;
    KeyPadding padding;
    HeadOptions options;
    Y* d_qkv;
    float* norm_sums;  // [heads of sequences][4, E]: shares of q's weight and bias and k's; null where not wanted
    float scale;
    int64_t rows, heads, head_dim;
};

// Of the backward in fp32 by tiles: the queries and keys whose P and dS are kept at a time, 192 KiB each, in L2.
constexpr int64_t kMostQueries = 128, kMostKeys = 256;

// Checked sizes and the work list of one call.
struct AttentionShape {
    int64_t rows, heads, head_dim, longest;  // longest: of the sequences there are, at most max_seqlen
    std::vector<HeadOfSequence> items;       // sequences of length 0 left out
};

// Whether fp32 is multiplied by AMX's tiles (tiles.h): the same for forward and backward, which makes the logits again,
// to the same bits. Packing three parts of each number pays from some length on, and not where half a step of 32
// numbers is filled up. Time over AVX-512's, one thread, 64 numbers a head: with 26 and 37 tokens forward 1.2 to 1.3,
// backward 0.97; with 50 and 65 forward about 1 (32 numbers: 1.15), backward 0.75 to 0.8. With 16 and 24 numbers both
// about 1.
constexpr int64_t kPartsLength = 48, kPartsHeadDim = 32;

template <class Y>
bool in_tile_parts(const AttentionShape& shape) {
    return std::is_same_v<Y, float> && has_tiles() && shape.longest >= kPartsLength && shape.head_dim >= kPartsHeadDim;
}

AttentionShape check_attention(const Tensor& qkv, const OptionalTensor& bias, const OptionalTensor& padding,
                               const Tensor& cu_seqlens, int64_t max_seqlen);
AttentionBias bias_of(const OptionalTensor& bias);
KeyPadding padding_of(const OptionalTensor& padding);

}  // namespace vitfast
