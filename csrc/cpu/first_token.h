#pragma once

#include "attention_heads.h"
#include "check.h"
#include "isa.h"

// Attention of the first token of each image alone: what the class token of a model's last block needs.
// Shapes: B images, L tokens, H heads, E head dim.
namespace vitfast {

template <class Y>
struct FirstToken {
    const Y *q, *kv;    // [B, H, E] and [B, L, 2, H, E]
    HeadOptions turns;  // of the keys: fewer than L
    Y* out;             // [B, H, E]
    float scale;
    int64_t images, length, heads, head_dim;
};

// out = softmax(scale * q K^T) V for every image and head.
template <class Y>
void first_token_attention(const FirstToken<Y>& args);

}  // namespace vitfast
