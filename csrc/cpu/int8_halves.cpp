#include <torch/csrc/stable/library.h>

#include "blocks.h"
#include "first_token.h"
#include "forward.h"
#include "int8_linear.h"

// Pre-norm blocks whose products are of 8-bit integers (int8_linear.cpp), one after the other in one call, for
// inference. Between them numbers are bf16: more bits would be rounded to 8 by the next product. Shapes: B images, T
// rows, D width, C = H * E, H heads, E head dim, F hidden width.
namespace vitfast {
namespace {

// A linear layer as int8_linear takes it: parameters at[0..3] are its packed integers, start, scale and bias.
struct Int8Layer {
    Tensor packed, start, scale;
    OptionalTensor bias;

    Int8Layer(const BlockParameters& p, size_t at)
        : packed(p.get(at)), start(p.get(at + 1)), scale(p.get(at + 2)), bias(p.maybe(at + 3)) {}

    int64_t outputs() const { return scale.numel(); }

    // Whether outputs may be split at `first`: where a panel, or a block of tiles, ends.
    bool splits_at(int64_t first) const {
        const int64_t unit = has_tiles() ? kTileLines : kPanelColumns;
        return first % unit == 0 && outputs() % unit == 0;
    }

    // Outputs [first, first + count) alone.
    Int8Layer part(int64_t first, int64_t count) const {
        Int8Layer some = *this;
        const int64_t words = packed.numel() / outputs();
        some.packed = narrow(packed, first * words, count * words);
        some.start = narrow(start, first, count);
        some.scale = narrow(scale, first, count);
        if (bias.has_value()) some.bias = narrow(*bias, first, count);
        return some;
    }
};

// LayerNorm's two, in fp32.
struct Int8Norm {
    Temporary wide_weight, wide_bias;
    Tensor weight, bias;

    Int8Norm(const BlockParameters& p, size_t at, int64_t width)
        : wide_weight({width}, kFloat),
          wide_bias({width}, kFloat),
          weight(as_float("norm_weight", p.get(at), wide_weight)),
          bias(as_float("norm_bias", p.get(at + 1), wide_bias)) {}
};

struct Int8Block {
    static constexpr size_t kParameters = 22;
    int64_t heads, head_dim;
    double scale, eps;
    const std::string& activation;
    const Rotation& rotation;
    Int8Norm norm1;
    Int8Layer qkv, proj;
    OptionalTensor proj_scale;
    Int8Norm norm2;
    Int8Layer fc1, fc2;
    OptionalTensor fc2_scale;

    Int8Block(const BlockParameters& p, int64_t width, int64_t heads, double scale, double eps,
              const std::string& activation, const Rotation& rotation)
        : heads(heads),
          scale(scale),
          eps(eps),
          activation(activation),
          rotation(rotation),
          norm1(p, 0, width),
          qkv(p, 2),
          proj(p, 6),
          proj_scale(p.maybe(10)),
          norm2(p, 11, width),
          fc1(p, 13),
          fc2(p, 17),
          fc2_scale(p.maybe(21)) {
        head_dim = head_dim_of(qkv.outputs(), heads);
    }

    // out = layer(norm(x))
    void normed(const Tensor& x, const Int8Norm& norm, const Int8Layer& layer, const std::string& then,
                const Tensor& out) const {
        int8_linear(x, norm.weight, norm.bias, eps, layer.packed, layer.start, layer.scale, layer.bias, then, {}, {},
                    out);
    }

    // out = residual + scale * layer(x)
    static void add(const Tensor& x, const Int8Layer& layer, const Tensor& residual, const OptionalTensor& factor,
                    const Tensor& out) {
        int8_linear(x, {}, {}, 0.0, layer.packed, layer.start, layer.scale, layer.bias, "none", residual, factor, out);
    }

    void attention(const Tensor& x, const Tensor& cu_seqlens, int64_t max_seqlen, const Tensor& out) const {
        const int64_t rows = x.size(0);
        const Temporary mixed({rows, 3, heads, head_dim}, kBFloat16), attended({rows, heads * head_dim}, kBFloat16);
        normed(x, norm1, qkv, "none", torch::stable::view(*mixed, {rows, qkv.outputs()}));
        attend(*mixed, scale, rotation, cu_seqlens, max_seqlen, *attended);
        add(*attended, proj, x, proj_scale, out);
    }

    // The attention half of the first token of each image alone: from x[T, D] to out[B, D].
    void first_token_attention_half(const Tensor& x, int64_t length, const Tensor& out) const {
        const int64_t rows = x.size(0), images = out.size(0), C = heads * head_dim;
        const Temporary first({images, x.size(1)}, x.scalar_type()), q({images, C}, kBFloat16),
            kv({rows, 2 * C}, kBFloat16), attended({images, C}, kBFloat16);
        first_rows(x, length, first);
        normed(*first, norm1, qkv.part(0, C), "none", *q);
        normed(x, norm1, qkv.part(C, 2 * C), "none", *kv);
        first_token_attention(FirstToken<bf16>{
            data<bf16>(*q), data<bf16>(*kv), turns_of(rotation, rows, length, head_dim), mutable_data<bf16>(*attended),
            static_cast<float>(scale), images, length, heads, head_dim});
        add(*attended, proj, *first, proj_scale, out);
    }

    void mlp(const Tensor& x, const Tensor& out) const {
        const int64_t rows = x.size(0), width = fc1.outputs();
        const Temporary hidden({rows, width}, kBFloat16);
        if (!is_gated(activation)) {
            normed(x, norm2, fc1, activation, *hidden);
            return add(*hidden, fc2, x, fc2_scale, out);
        }
        const Temporary joined({rows, width / 2}, kBFloat16);
        normed(x, norm2, fc1, "none", *hidden);
        activation_forward(*hidden, activation, *joined);
        add(*joined, fc2, x, fc2_scale, out);
    }
};

// Blocks as run_blocks says. Parameters of each: norm1 weight, bias; of qkv, proj, fc1 and fc2 packed integers, start,
// scale and bias (int8_linear.cpp), after proj and fc2 LayerScale's factor; norm2's weight and bias before fc1.
void int8_blocks_forward(Tensor x, std::vector<Tensor> parameters, int64_t heads, double scale, double eps,
                         std::string activation, OptionalTensor cos, OptionalTensor sin, bool interleaved,
                         Tensor cu_seqlens, int64_t max_seqlen, bool first_token, Tensor out) {
    const Rotation rotation{cos, sin, interleaved};
    const auto block = [&](const Tensor& from, const BlockParameters& p, const Tensor& middle, const Tensor& to) {
        const Int8Block one(p, from.size(1), heads, scale, eps, activation, rotation);
        one.attention(from, cu_seqlens, max_seqlen, middle);
        one.mlp(middle, to);
    };
    const auto last = [&](const Tensor& from, const BlockParameters& p, const Tensor& to) {
        const Int8Block one(p, from.size(1), heads, scale, eps, activation, rotation);
        const Temporary middle({to.size(0), from.size(1)}, from.scalar_type());
        if (one.qkv.splits_at(one.heads * one.head_dim)) {
            one.first_token_attention_half(from, max_seqlen, *middle);
        } else {
            const Temporary all({from.size(0), from.size(1)}, from.scalar_type());
            one.attention(from, cu_seqlens, max_seqlen, *all);
            first_rows(*all, max_seqlen, middle);
        }
        one.mlp(*middle, to);
    };
    run_blocks(x, parameters, Int8Block::kParameters, cu_seqlens, max_seqlen, first_token, out, block, last);
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("int8_blocks_forward", TORCH_BOX(&vitfast::int8_blocks_forward));
}
