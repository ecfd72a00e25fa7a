#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "shares.h"

#define VITFAST_WITH_AMX
#define VITFAST_KERNEL "attention_backward_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

// Query rows at a time: whole register tiles, an even number for bf16 pairs, S and dP together small enough for L2.
int64_t query_block(int64_t length, bool tiles) {
    constexpr int64_t kLogits = 64 * 1024;
    const int64_t least = tiles ? 32 : 12, most = tiles ? 64 : 72;
    return std::clamp(kLogits / std::max<int64_t>(length, 1) / least * least, least, most);
}

// An upper bound for the scratch of PartBackward, whose lines fill whole blocks of tiles.
int64_t part_backward_words(int64_t length, int64_t head_dim) {
    const int64_t columns = (tile_blocks(length) + 1) * kTileLines, width = (tile_blocks(head_dim) + 1) * kTileLines;
    const int64_t queries = std::min(columns, kMostQueries), keys = std::min(columns, kMostKeys);
    const int64_t packed = 3 * columns * width + 4 * queries * width + (2 * queries + kTileLines) * keys;
    const int64_t sums = 3 * columns * width + queries * (width + 2) + 2 * kTileLines * (keys + kTileLines);
    return packed * 3 / 2 + sums + (length + queries) * head_dim;
}

// What one thread does in one go: heads that add to the same slice of d_bias in a fixed order, into partial sums of
// their own. Without d_bias, one head.
struct Unit {
    int64_t slice;
    std::vector<HeadOfSequence> items;
};

// The heads of every bias slice, cut into `parts` units each. Units depend on the shapes alone, so that the bits of
// d_bias do not depend on the number of threads.
std::vector<Unit> make_units(const AttentionShape& shape, const AttentionBias& bias, int64_t parts) {
    const int64_t slices = bias.batches * bias.heads;
    std::vector<Unit> units(slices * parts);
    std::vector<int64_t> seen(slices);
    for (int64_t i = 0; i < slices * parts; ++i) units[i].slice = i / parts;
    for (const HeadOfSequence& item : shape.items) {
        const int64_t slice = bias.slice(item.sequence, item.head);
        units[slice * parts + seen[slice]++ % parts].items.push_back(item);
    }
    return units;
}

// Units per bias slice: enough of them for many cores, as long as the partial sums stay within 64 MiB.
int64_t parts_per_slice(const AttentionShape& shape, const AttentionBias& bias) {
    const int64_t slices = bias.batches * bias.heads, elements = slices * bias.length * bias.length;
    const int64_t sharing = shape.items.size() / std::max<int64_t>(slices, 1);
    const int64_t affordable = (16 << 20) / std::max<int64_t>(elements, 1);
    const int64_t useful = (64 + slices - 1) / std::max<int64_t>(slices, 1);
    return std::max<int64_t>(1, std::min({sharing, affordable, useful}));
}

template <class Y>
void run_backward(const AttentionBackward<Y>& args, const AttentionShape& shape, float* d_bias) {
    std::vector<Unit> units;
    std::vector<float> partial;  // [parts - 1][bias elements]: the first part of each slice adds to d_bias itself
    int64_t parts = 1;
    const int64_t slice_size = args.bias.length * args.bias.length;
    const int64_t elements = args.bias.batches * args.bias.heads * slice_size;
    if (d_bias) {
        parts = parts_per_slice(shape, args.bias);
        units = make_units(shape, args.bias, parts);
        partial.resize((parts - 1) * elements);
        std::fill(d_bias, d_bias + elements, 0.0f);
    } else {
        for (const HeadOfSequence& item : shape.items) units.push_back({0, {item}});
    }
    const bool in_parts = in_tile_parts<Y>(shape);
    const int64_t block = query_block(shape.longest, std::is_same_v<Y, bf16> && has_tiles());
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t columns = (shape.longest + 15) / 16 * 16, width = (shape.head_dim + 15) / 16 * 16;
    const int64_t words = in_parts ? part_backward_words(shape.longest, shape.head_dim)
                                   : 5 * columns * width + 5 * block * width + 5 * block * columns +
                                         (shape.longest + block) * shape.head_dim;
    const int64_t count = units.size();
    const int64_t workers = std::min(threads, count);
    Shares shares(count, workers);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t thread, int64_t) {
        Scratch scratch(words);
        for (int64_t i; shares.take(thread, &i);) {
            float* slice = nullptr;
            if (d_bias) {
                float* const sums = i % parts == 0 ? d_bias : partial.data() + (i % parts - 1) * elements;
                slice = sums + units[i].slice * slice_size;
            }
            for (const HeadOfSequence& item : units[i].items) {
                VITFAST_DISPATCH(attention_backward_head(args, item, block, shape.longest, in_parts, scratch, slice));
            }
        }
    });
    if (parts == 1) return;
    torch::stable::parallel_for(0, elements, 16384, [&](int64_t begin, int64_t end) {
        for (int64_t part = 0; part < parts - 1; ++part) {
            const float* const sums = partial.data() + part * elements;
            for (int64_t i = begin; i < end; ++i) d_bias[i] += sums[i];
        }
    });
}

// d_norm[2, E] = the sums over all heads of sequences of the rows `row` and `row + 1` of their norm_sums[4, E].
void sum_norms(const std::vector<float>& norm_sums, int64_t head_dim, int64_t row, const OptionalTensor& d_norm) {
    if (!d_norm.has_value()) return;
    float* const out = mutable_data<float>(*d_norm);
    std::fill(out, out + 2 * head_dim, 0.0f);
    for (size_t at = row * head_dim; at < norm_sums.size(); at += 4 * head_dim) {
        for (int64_t e = 0; e < 2 * head_dim; ++e) out[e] += norm_sums[at + e];
    }
}

// d_qkv[T, 3, H, E] and, where wanted, d_bias (bias's shape, fp32) and d_q_norm, d_k_norm[2, E] (weight, bias), from
// d_out[T, H, E] and what the forward kept.
void attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, double scale, OptionalTensor bias,
                        OptionalTensor padding, OptionalTensor cos, OptionalTensor sin, bool interleaved,
                        std::string q_norm, std::string k_norm, OptionalTensor q_weight, OptionalTensor q_bias,
                        OptionalTensor k_weight, OptionalTensor k_bias, double q_eps, double k_eps, Tensor cu_seqlens,
                        int64_t max_seqlen, Tensor d_qkv, OptionalTensor d_bias, OptionalTensor d_q_norm,
                        OptionalTensor d_k_norm) {
    const AttentionShape shape = check_attention(qkv, bias, padding, cu_seqlens, max_seqlen);
    const auto dtype = qkv.scalar_type();
    check("d_out", d_out, Device::kCpu, {dtype}, {shape.rows, shape.heads, shape.head_dim});
    check("out", out, Device::kCpu, {dtype}, {shape.rows, shape.heads, shape.head_dim});
    check("lse", lse, Device::kCpu, {ScalarType::Float}, {shape.heads, shape.rows});
    check("d_qkv", d_qkv, Device::kCpu, {dtype}, {shape.rows, 3, shape.heads, shape.head_dim});
    if (d_bias.has_value()) {
        if (!bias.has_value()) fail("bias is None; d_bias needs it");
        check("d_bias", d_bias, Device::kCpu, {ScalarType::Float},
              {bias->size(0), bias->size(1), bias->size(2), bias->size(3)});
    }
    const HeadOptions options =
        check_heads({cos, sin, interleaved, q_norm, k_norm, q_weight, q_bias, k_weight, k_bias, q_eps, k_eps},
                    shape.rows, shape.head_dim);
    check("d_q_norm", d_q_norm, Device::kCpu, {ScalarType::Float}, {2, shape.head_dim});
    check("d_k_norm", d_k_norm, Device::kCpu, {ScalarType::Float}, {2, shape.head_dim});
    std::vector<float> norm_sums;
    if (d_q_norm.has_value() || d_k_norm.has_value()) norm_sums.resize(shape.items.size() * 4 * shape.head_dim);
    const auto run = [&](auto type) {
        using Y = decltype(type);
        run_backward(AttentionBackward<Y>{data<Y>(d_out), data<Y>(qkv), data<Y>(out), data<float>(lse), bias_of(bias),
                                          padding_of(padding), options, mutable_data<Y>(d_qkv),
                                          norm_sums.empty() ? nullptr : norm_sums.data(), static_cast<float>(scale),
                                          shape.rows, shape.heads, shape.head_dim},
                     shape, mutable_data<float>(d_bias));
    };
    if (dtype == ScalarType::Float) {
        run(float{});
    } else {
        run(bf16{});
    }
    sum_norms(norm_sums, shape.head_dim, 0, d_q_norm);
    sum_norms(norm_sums, shape.head_dim, 2, d_k_norm);
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) { m.impl("attention_backward", TORCH_BOX(&vitfast::attention_backward)); }
