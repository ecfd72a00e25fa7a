#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "blocks.h"
#include "first_token.h"
#include "forward.h"
#include "isa.h"
#include "linear.h"
#include "tile_linear.h"

// The two halves of a pre-norm block at inference, each in one call: nothing between its input and its output outlives
// it, and for a small model the calls themselves would cost as much as the arithmetic. Shapes: T rows, D width,
// C = 3 * H * E, H heads, E head dim, F hidden width. X: dtype of x and out; Y: dtype of the weights of products.
namespace vitfast {
namespace {

// A matrix between an op and a product: in the order of TileRows where the product would otherwise bring it into that.
// fp32's parts take half as much again, and more time on their way than packing does. piece: columns that the op writes
// together; whole vectors.
class Between : public Temporary {
  public:
    Between(int64_t rows, int64_t width, ScalarType dtype, int64_t piece = kTileLines)
        : Between(has_tiles() && dtype == kBFloat16 && width % kTileLines == 0 && piece % 16 == 0, rows, width, dtype) {
    }

    bf16* tiles() const { return tiles_ ? mutable_data<bf16>(**this) : nullptr; }  // null: row by row

  private:
    Between(bool tiles, int64_t rows, int64_t width, ScalarType dtype)
        : Temporary({rows, width}, dtype, tiles ? kTileLines * width * sizeof(bf16) : 0), tiles_(tiles) {}

    bool tiles_;
};

void norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& normed, bf16* in_tiles) {
    const int64_t rows = x.size(0), width = x.size(1);
    const Temporary mean({rows}, kFloat), rstd({rows}, kFloat), wide_weight({width}, kFloat),
        wide_bias({width}, kFloat);
    layer_norm_forward(x, {}, {}, {}, as_float("norm_weight", weight, wide_weight),
                       as_float("norm_bias", bias, wide_bias), eps, {}, normed, *mean, *rstd, in_tiles);
}

// out[T, D] = x + proj_scale * (attention(norm(x) qkv_weight^T + qkv_bias) proj_weight^T + proj_bias)
void norm_attention(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                    const Tensor& qkv_weight, const OptionalTensor& qkv_packed, const OptionalTensor& qkv_bias,
                    int64_t heads, double scale, const Rotation& rotation, const Tensor& cu_seqlens, int64_t max_seqlen,
                    const Tensor& proj_weight, const OptionalTensor& proj_packed, const OptionalTensor& proj_bias,
                    const OptionalTensor& proj_scale, const Tensor& out) {
    check("x", x, Device::kCpu, {kFloat, kBFloat16}, {-1, -1});
    const auto dtype = qkv_weight.scalar_type();
    const int64_t rows = x.size(0), head_dim = head_dim_of(qkv_weight.size(0), heads), outputs = 3 * heads * head_dim;
    const Temporary qkv({rows, 3, heads, head_dim}, dtype);
    const Between normed(rows, x.size(1), dtype), attended(rows, heads * head_dim, dtype, head_dim);
    norm(x, norm_weight, norm_bias, eps, *normed, normed.tiles());
    linear(*normed, qkv_weight, false, qkv_packed, qkv_bias, "none", {}, {}, {}, {},
           torch::stable::view(*qkv, {rows, outputs}), {normed.tiles(), nullptr});
    attend(*qkv, scale, rotation, cu_seqlens, max_seqlen, *attended, attended.tiles() != nullptr);
    linear(*attended, proj_weight, false, proj_packed, proj_bias, "none", x, proj_scale, {}, {}, out,
           {attended.tiles(), nullptr});
}

void norm_attention_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor qkv_weight,
                            OptionalTensor qkv_packed, OptionalTensor qkv_bias, int64_t heads, double scale,
                            Tensor cu_seqlens, int64_t max_seqlen, Tensor proj_weight, OptionalTensor proj_packed,
                            OptionalTensor proj_bias, OptionalTensor proj_scale, Tensor out) {
    norm_attention(x, norm_weight, norm_bias, eps, qkv_weight, qkv_packed, qkv_bias, heads, scale, {}, cu_seqlens,
                   max_seqlen, proj_weight, proj_packed, proj_bias, proj_scale, out);
}

// out[T, D] = x + scale * (activation(norm(x) fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias)
void norm_mlp_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, double eps, Tensor fc1_weight,
                      OptionalTensor fc1_packed, OptionalTensor fc1_bias, std::string activation, Tensor fc2_weight,
                      OptionalTensor fc2_packed, OptionalTensor fc2_bias, OptionalTensor scale, Tensor out) {
    check("x", x, Device::kCpu, {kFloat, kBFloat16}, {-1, -1});
    check("fc1_weight", fc1_weight, Device::kCpu, {kFloat, kBFloat16}, {-1, x.size(1)});
    const auto dtype = fc1_weight.scalar_type();
    const int64_t rows = x.size(0);
    const int64_t width = fc1_weight.size(0);
    const Between normed(rows, x.size(1), dtype);
    norm(x, norm_weight, norm_bias, eps, *normed, normed.tiles());
    if (is_gated(activation)) {
        const Temporary hidden({rows, width}, dtype), joined({rows, width / 2}, dtype);
        linear(*normed, fc1_weight, false, fc1_packed, fc1_bias, "none", {}, {}, {}, {}, *hidden,
               {normed.tiles(), nullptr});
        activation_forward(*hidden, activation, *joined);
        return linear(*joined, fc2_weight, false, fc2_packed, fc2_bias, "none", x, scale, {}, {}, out);
    }
    const Between hidden(rows, width, dtype);
    linear(*normed, fc1_weight, false, fc1_packed, fc1_bias, activation, {}, {}, {}, {}, *hidden,
           {normed.tiles(), hidden.tiles()});
    linear(*hidden, fc2_weight, false, fc2_packed, fc2_bias, "none", x, scale, {}, {}, out, {hidden.tiles(), nullptr});
}

void block_mlp(const Tensor& x, const BlockParameters& p, double eps, const std::string& activation,
               const Tensor& out) {
    norm_mlp_forward(x, p.get(9), p.get(10), eps, p.get(11), p.maybe(12), p.maybe(13), activation, p.get(14),
                     p.maybe(15), p.maybe(16), p.maybe(17), out);
}

// Rows [first, first + count) of a weight and its bias, and the panels that stand for them where those are whole.
struct Rows {
    Tensor weight;
    OptionalTensor packed, bias;

    Rows(const Tensor& all, const OptionalTensor& all_packed, const OptionalTensor& all_bias, int64_t first,
         int64_t count)
        : weight(narrow(all, first, count)) {
        if (all_bias.has_value()) bias = narrow(*all_bias, first, count);
        const int64_t outputs = all.size(0);
        if (!all_packed.has_value() || first % kPanelColumns != 0 || outputs % kPanelStep != 0) return;
        if (first + count < outputs && count % kPanelColumns != 0) return;
        const int64_t words = all_packed->size(0) / outputs;
        packed = narrow(*all_packed, first * words, count * words);
    }
};

// out[B, D]: what a block makes of the first token of each image of L tokens. The others give keys and values alone.
void first_token_forward(const Tensor& x, const BlockParameters& p, int64_t heads, double scale, double eps,
                         const std::string& activation, const Rotation& rotation, int64_t length, const Tensor& out) {
    const Tensor& weight = p.get(2);
    const auto dtype = weight.scalar_type();
    const int64_t head_dim = head_dim_of(weight.size(0), heads), C = heads * head_dim;
    const int64_t rows = x.size(0), width = x.size(1), images = out.size(0);
    const Temporary normed({rows, width}, dtype), first_normed({images, width}, dtype);
    const Temporary first({images, width}, x.scalar_type()), middle({images, width}, x.scalar_type());
    const Temporary q({images, C}, dtype), kv({rows, 2 * C}, dtype), attended({images, C}, dtype);
    norm(x, p.get(0), p.get(1), eps, *normed, nullptr);
    first_rows(x, length, first);
    first_rows(*normed, length, first_normed);
    const Rows of_q(weight, p.maybe(3), p.maybe(4), 0, C), of_kv(weight, p.maybe(3), p.maybe(4), C, 2 * C);
    linear(*first_normed, of_q.weight, false, of_q.packed, of_q.bias, "none", {}, {}, {}, {}, *q);
    linear(*normed, of_kv.weight, false, of_kv.packed, of_kv.bias, "none", {}, {}, {}, {}, *kv);
    const HeadOptions turns = turns_of(rotation, rows, length, head_dim);
    const auto attend = [&](auto type) {
        using Y = decltype(type);
        first_token_attention(FirstToken<Y>{data<Y>(*q), data<Y>(*kv), turns, mutable_data<Y>(*attended),
                                            static_cast<float>(scale), images, length, heads, head_dim});
    };
    dtype == kFloat ? attend(float{}) : attend(bf16{});
    linear(*attended, p.get(5), false, p.maybe(6), p.maybe(7), "none", *first, p.maybe(8), {}, {}, *middle);
    block_mlp(*middle, p, eps, activation, out);
}

// Blocks, each norm_attention and then norm_mlp_forward, as run_blocks says. Parameters of each: norm1 weight, bias;
// qkv weight, packed, bias; proj weight, packed, bias, scale; norm2 weight, bias; fc1 weight, packed, bias; fc2 weight,
// packed, bias, scale.
void blocks_forward(Tensor x, std::vector<Tensor> parameters, int64_t heads, double scale, double eps,
                    std::string activation, OptionalTensor cos, OptionalTensor sin, bool interleaved, Tensor cu_seqlens,
                    int64_t max_seqlen, bool first_token, Tensor out) {
    constexpr size_t kEach = 18;
    const Rotation rotation{cos, sin, interleaved};
    const auto block = [&](const Tensor& from, const BlockParameters& p, const Tensor& middle, const Tensor& to) {
        norm_attention(from, p.get(0), p.get(1), eps, p.get(2), p.maybe(3), p.maybe(4), heads, scale, rotation,
                       cu_seqlens, max_seqlen, p.get(5), p.maybe(6), p.maybe(7), p.maybe(8), middle);
        block_mlp(middle, p, eps, activation, to);
    };
    const auto last = [&](const Tensor& from, const BlockParameters& p, const Tensor& to) {
        first_token_forward(from, p, heads, scale, eps, activation, rotation, max_seqlen, to);
    };
    run_blocks(x, parameters, kEach, cu_seqlens, max_seqlen, first_token, out, block, last);
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("norm_attention_forward", TORCH_BOX(&vitfast::norm_attention_forward));
    m.impl("blocks_forward", TORCH_BOX(&vitfast::blocks_forward));
    m.impl("norm_mlp_forward", TORCH_BOX(&vitfast::norm_mlp_forward));
}
