#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "forward.h"
#include "shares.h"

#define VITFAST_WITH_AMX
#define VITFAST_KERNEL "attention_forward_kernel.h"
#include "for_each_isa.h"

namespace vitfast {

AttentionShape check_attention(const Tensor& qkv, const OptionalTensor& bias, const OptionalTensor& padding,
                               const Tensor& cu_seqlens, int64_t max_seqlen) {
    check("qkv", qkv, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, 3, -1, -1});
    AttentionShape shape{qkv.size(0), qkv.size(2), qkv.size(3), 0, {}};
    if (shape.head_dim < 1 || shape.head_dim > kMostHeadDim) {
        fail("qkv has head dim ", shape.head_dim, "; allowed: 1 to ", kMostHeadDim);
    }
    check("cu_seqlens", cu_seqlens, Device::kCpu, {ScalarType::Int}, {-1});
    const int64_t sequences = cu_seqlens.numel() - 1;
    if (sequences < 0) fail("cu_seqlens is empty; it needs the number of sequences plus 1 elements");
    const int32_t* const starts = data<int32_t>(cu_seqlens);
    if (starts[0] != 0 || starts[sequences] != shape.rows) {
        fail("cu_seqlens runs from ", starts[0], " to ", starts[sequences], "; it must run from 0 to qkv's ",
             shape.rows, " rows");
    }
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t length = starts[s + 1] - starts[s];
        if (length < 0 || length > max_seqlen) {
            fail("cu_seqlens gives sequence ", s, " the length ", length, "; allowed: 0 to max_seqlen, ", max_seqlen);
        }
        shape.longest = std::max(shape.longest, length);
        for (int64_t h = 0; h < shape.heads && length > 0; ++h) {
            shape.items.push_back({s, h, starts[s], length, static_cast<int64_t>(shape.items.size())});
        }
    }
    if (bias.has_value()) {
        check("bias", bias, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1, max_seqlen, max_seqlen});
        const int64_t batches = bias->size(0), heads = bias->size(1);
        if ((batches != 1 && batches != sequences) || (heads != 1 && heads != shape.heads)) {
            fail("bias has shape ", show_shape(*bias), "; its first size must be 1 or ", sequences,
                 " (sequences), its second 1 or ", shape.heads, " (heads)");
        }
    }
    check("padding", padding, Device::kCpu, {ScalarType::Bool}, {sequences, max_seqlen});
    return shape;
}

namespace {

HeadNorm check_norm(const char* name, const std::string& kind, const OptionalTensor& weight, const OptionalTensor& bias,
                    double eps, int64_t head_dim) {
    if (kind.empty()) return {};
    if (kind != "layer_norm" && kind != "rms_norm") {
        fail(name, " is \"", kind, "\"; allowed: \"\", \"layer_norm\", \"rms_norm\"");
    }
    check("a head norm's weight", weight, Device::kCpu, {ScalarType::Float}, {head_dim});
    check("a head norm's bias", bias, Device::kCpu, {ScalarType::Float}, {head_dim});
    return {kind == "layer_norm" ? HeadNormKind::kLayerNorm : HeadNormKind::kRmsNorm, data<float>(weight),
            data<float>(bias), static_cast<float>(eps)};
}

}  // namespace

HeadOptions check_heads(const HeadArguments& a, int64_t rows, int64_t head_dim) {
    HeadOptions options;
    options.norms[0] = check_norm("q_norm", a.q_norm, a.q_weight, a.q_bias, a.q_eps, head_dim);
    options.norms[1] = check_norm("k_norm", a.k_norm, a.k_weight, a.k_bias, a.k_eps, head_dim);
    check_together("cos", a.cos, "sin", a.sin);
    if (!a.cos.has_value()) return options;
    if (head_dim % 2) fail("cos is given with head dim ", head_dim, "; allowed: an even one");
    check("cos", a.cos, Device::kCpu, {ScalarType::Float}, {-1, -1});
    options.rotated = a.cos->size(0);
    options.columns = a.cos->size(1);
    if (options.columns != head_dim && options.columns != head_dim / 2) {
        fail("cos has ", options.columns, " columns; allowed: ", head_dim, " or ", head_dim / 2);
    }
    check("sin", a.sin, Device::kCpu, {ScalarType::Float}, {options.rotated, options.columns});
    options.cos = data<float>(a.cos);
    options.sin = data<float>(a.sin);
    options.interleaved = a.interleaved;
    options.row_by_row = options.rotated == rows;  // of one sequence alone both ways mean the same
    return options;
}

KeyPadding padding_of(const OptionalTensor& padding) {
    if (!padding.has_value()) return {};
    return {data<uint8_t>(*padding), padding->size(1)};
}

AttentionBias bias_of(const OptionalTensor& bias) {
    if (!bias.has_value()) return {};
    const bool is_float = bias->scalar_type() == ScalarType::Float;
    return {is_float ? data<float>(*bias) : nullptr, is_float ? nullptr : data<bf16>(*bias), bias->size(0),
            bias->size(1), bias->size(2)};
}

namespace {

// Query rows at a time: a whole number of register tiles, few enough for their logits to stay in L2.
int64_t query_block(int64_t length, bool tiles) {
    constexpr int64_t kLogits = 64 * 1024;
    const int64_t least = tiles ? 32 : 12, most = tiles ? 64 : 36;
    return std::clamp(kLogits / std::max<int64_t>(length, 1) / least * least, least, most);
}

// Few heads: the queries of each are split as well, at the price of packing K and V once per part, which takes as long
// as `packing` queries.
int64_t parts_of_a_head(int64_t items, int64_t threads, int64_t length, int64_t block, int64_t packing) {
    constexpr int64_t kEnoughItems = 4;  // per thread
    const int64_t most = items >= kEnoughItems * threads ? 1 : (length + block - 1) / block;
    int64_t best = 1, least = std::numeric_limits<int64_t>::max();
    for (int64_t parts = 1; parts <= most; ++parts) {
        const int64_t time = (items * parts + threads - 1) / threads * (length / parts + packing);
        if (time < least) best = parts;
        least = std::min(time, least);
    }
    return best;
}

template <class Y>
void run_forward(const AttentionForward<Y>& args, const AttentionShape& shape) {
    const bool in_parts = in_tile_parts<Y>(shape);
    const int64_t block = in_parts ? kTileLines : query_block(shape.longest, std::is_same_v<Y, bf16> && has_tiles());
    const int64_t threads = torch::stable::get_num_threads();
    // Lines fill whole blocks of tiles; a packed number takes up to three parts of half a word.
    const int64_t columns = (tile_blocks(shape.longest) + 1) * kTileLines;
    const int64_t width = (tile_blocks(shape.head_dim) + 1) * kTileLines;
    const int64_t packed = 2 * columns * width + block * (columns + width);
    const int64_t words = packed * 3 / 2 + block * (columns + width + 1) + (shape.longest + block) * shape.head_dim;
    const int64_t items = shape.items.size();
    constexpr int64_t kPacking = 12, kPackingParts = 36;  // queries, by measurement
    const int64_t parts = parts_of_a_head(items, threads, shape.longest, block, in_parts ? kPackingParts : kPacking);
    const int64_t workers = std::min(threads, items * parts);
    Shares shares(items * parts, workers);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t thread, int64_t) {
        Scratch scratch(words);
        int64_t packed_item = -1;
        for (int64_t i; shares.take(thread, &i);) {
            const HeadOfSequence& item = shape.items[i / parts];
            const int64_t blocks = (item.length + block - 1) / block, part = i % parts;
            const int64_t begin = blocks * part / parts * block;
            const int64_t end = std::min(item.length, blocks * (part + 1) / parts * block);
            if (begin >= end) continue;
            const bool pack = packed_item != i / parts;
            packed_item = i / parts;
            VITFAST_DISPATCH(
                attention_forward_queries(args, item, begin, end, block, shape.longest, pack, in_parts, scratch));
        }
    });
}

}  // namespace

// out[T, H, E] = softmax(scale * Q K^T + bias) V for every sequence and head; lse[H, T] = log(sum(exp(logits))).
// padding[S, L] is true for keys that no query sees. in_tiles: out in the order of TileRows, behind the tensor's rows
// as many as fill the last block; E is then a multiple of 16.
void attention_forward(Tensor qkv, double scale, OptionalTensor bias, OptionalTensor padding, OptionalTensor cos,
                       OptionalTensor sin, bool interleaved, std::string q_norm, std::string k_norm,
                       OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
                       double q_eps, double k_eps, Tensor cu_seqlens, int64_t max_seqlen, Tensor out, Tensor lse,
                       bool in_tiles) {
    const AttentionShape shape = check_attention(qkv, bias, padding, cu_seqlens, max_seqlen);
    check("out", out, Device::kCpu, {qkv.scalar_type()}, {shape.rows, shape.heads, shape.head_dim});
    check("lse", lse, Device::kCpu, {ScalarType::Float}, {shape.heads, shape.rows});
    const HeadOptions options =
        check_heads({cos, sin, interleaved, q_norm, k_norm, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps},
                    shape.rows, shape.head_dim);
    const auto run = [&](auto type) {
        using Y = decltype(type);
        run_forward(AttentionForward<Y>{data<Y>(qkv), bias_of(bias), padding_of(padding), options, mutable_data<Y>(out),
                                        mutable_data<float>(lse), static_cast<float>(scale), shape.rows, shape.heads,
                                        shape.head_dim, in_tiles},
                    shape);
    };
    if (qkv.scalar_type() == ScalarType::Float) {
        run(float{});
    } else {
        run(bf16{});
    }
}

namespace {

void attention_forward_op(Tensor qkv, double scale, OptionalTensor bias, OptionalTensor padding, OptionalTensor cos,
                          OptionalTensor sin, bool interleaved, std::string q_norm, std::string k_norm,
                          OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight,
                          OptionalTensor k_bias, double q_eps, double k_eps, Tensor cu_seqlens, int64_t max_seqlen,
                          Tensor out, Tensor lse) {
    attention_forward(qkv, scale, bias, padding, cos, sin, interleaved, q_norm, k_norm, q_weight, q_bias, k_weight,
                      k_bias, q_eps, k_eps, cu_seqlens, max_seqlen, out, lse);
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) { m.impl("attention_forward", TORCH_BOX(&vitfast::attention_forward_op)); }
