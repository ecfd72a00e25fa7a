#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "isa.h"
#include "linear.h"

// Shapes: B images of C channels and Hi x Wi pixels, patches of P x P, N = (Hi / P) * (Wi / P), R prefix tokens, D
// width.
namespace vitfast {

template <class X, class Y>
struct Patchify {
    const X* images;
    const float *scale, *shift;
    Y* patches;
    int64_t stride[4];
    int64_t channels, patch, grid_h, grid_w;
};

template <class Y, class X>
struct Unpatchify {
    const Y* d_patches;
    const float* scale;
    X* d_images;
    int64_t channels, patch, grid_h, grid_w;
};

template <class Y, class X>
struct AssembleTokens {
    const Y* projected;
    Parameter bias, pos_embed, prefix;
    X* tokens;
    int64_t width, tokens_per_image, prefixes;
    bool pos_has_prefix;
};

}  // namespace vitfast

#define VITFAST_KERNEL "patch_embed_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kBFloat16 = ScalarType::BFloat16;

// Calls run(T{}) with the C++ type of the tensor's elements; the dtype has been checked.
template <class Run>
void with_type(const Tensor& tensor, const Run& run) {
    if (tensor.scalar_type() == kFloat) {
        run(float{});
    } else {
        run(bf16{});
    }
}

template <class Run>
void with_pixel_type(const Tensor& images, const Run& run) {
    if (images.scalar_type() == ScalarType::Byte) {
        run(uint8_t{});
    } else if (images.scalar_type() == ScalarType::Half) {
        run(fp16{});
    } else {
        with_type(images, run);
    }
}

// Height and width of the grid of patches.
std::pair<int64_t, int64_t> grid_of(const char* name, const Tensor& images, int64_t patch) {
    if (images.dim() != 4) fail(name, " has shape ", show_shape(images), "; needed: [B, C, height, width]");
    if (patch < 1) fail("patch is ", patch, "; allowed: 1 or more");
    if (images.size(2) % patch != 0 || images.size(3) % patch != 0) {
        fail(name, " has shape ", show_shape(images), "; height and width must be multiples of patch, ", patch);
    }
    return {images.size(2) / patch, images.size(3) / patch};
}

// patches[b * N + n, (c, p, q)] = images[b, c, y, x] * scale[c] + shift[c]
void patchify(Tensor images, int64_t patch, Tensor scale, Tensor shift, Tensor patches) {
    check_kind("images", images, Device::kCpu, {ScalarType::Byte, kFloat, kBFloat16, ScalarType::Half});
    const auto [grid_h, grid_w] = grid_of("images", images, patch);
    const int64_t batch = images.size(0), channels = images.size(1), rows = batch * grid_h;
    check("scale", scale, Device::kCpu, {kFloat}, {channels});
    check("shift", shift, Device::kCpu, {kFloat}, {channels});
    check("patches", patches, Device::kCpu, {kFloat, kBFloat16}, {rows * grid_w, channels * patch * patch});
    with_pixel_type(images, [&](auto x_type) {
        with_type(patches, [&](auto y_type) {
            using X = decltype(x_type);
            using Y = decltype(y_type);
            Patchify<X, Y> args{data<X>(images),
                                data<float>(scale),
                                data<float>(shift),
                                mutable_data<Y>(patches),
                                {},
                                channels,
                                patch,
                                grid_h,
                                grid_w};
            for (int axis = 0; axis < 4; ++axis) args.stride[axis] = images.stride(axis);
            torch::stable::parallel_for(
                0, rows, 1, [&](int64_t begin, int64_t end) { VITFAST_DISPATCH(patchify_rows(args, begin, end)); });
        });
    });
}

// d_images[b, c, y, x] = d_patches[b * N + n, (c, p, q)] * scale[c]: the gradient of patchify
void unpatchify(Tensor d_patches, int64_t patch, Tensor scale, Tensor d_images) {
    const auto [grid_h, grid_w] = grid_of("d_images", d_images, patch);
    const int64_t batch = d_images.size(0), channels = d_images.size(1), rows = batch * grid_h;
    check("d_images", d_images, Device::kCpu, {kFloat, kBFloat16}, {batch, channels, -1, -1});
    check("scale", scale, Device::kCpu, {kFloat}, {channels});
    check("d_patches", d_patches, Device::kCpu, {kFloat, kBFloat16}, {rows * grid_w, channels * patch * patch});
    with_type(d_patches, [&](auto y_type) {
        with_type(d_images, [&](auto x_type) {
            using Y = decltype(y_type);
            using X = decltype(x_type);
            const Unpatchify<Y, X> args{
                data<Y>(d_patches), data<float>(scale), mutable_data<X>(d_images), channels, patch, grid_h, grid_w};
            torch::stable::parallel_for(
                0, rows, 1, [&](int64_t begin, int64_t end) { VITFAST_DISPATCH(unpatchify_rows(args, begin, end)); });
        });
    });
}

// tokens[b] = prefix rows, then projected rows + bias; plus pos_embed, which covers all tokens or the patches only.
void assemble_tokens(Tensor projected, OptionalTensor bias, OptionalTensor pos_embed, OptionalTensor prefix,
                     Tensor tokens) {
    check("tokens", tokens, Device::kCpu, {kFloat, kBFloat16}, {-1, -1, -1});
    const int64_t batch = tokens.size(0), length = tokens.size(1), width = tokens.size(2);
    check("prefix", prefix, Device::kCpu, {kFloat, kBFloat16}, {-1, width});
    const int64_t prefixes = prefix.has_value() ? prefix->size(0) : 0, patches = length - prefixes;
    if (patches < 0) fail("prefix has ", prefixes, " rows; tokens has room for ", length);
    check("projected", projected, Device::kCpu, {kFloat, kBFloat16}, {batch * patches, width});
    check("pos_embed", pos_embed, Device::kCpu, {kFloat, kBFloat16}, {-1, width});
    const int64_t positions = pos_embed.has_value() ? pos_embed->size(0) : length;
    if (positions != length && positions != patches) {
        fail("pos_embed has ", positions, " rows; allowed: ", patches, " (patches) or ", length, " (prefix too)");
    }
    with_type(projected, [&](auto y_type) {
        with_type(tokens, [&](auto x_type) {
            using Y = decltype(y_type);
            using X = decltype(x_type);
            const AssembleTokens<Y, X> args{data<Y>(projected),
                                            parameter("bias", bias, width),
                                            numbers_of(pos_embed),
                                            numbers_of(prefix),
                                            mutable_data<X>(tokens),
                                            width,
                                            length,
                                            prefixes,
                                            positions == length};
            torch::stable::parallel_for(0, batch * length, 16, [&](int64_t begin, int64_t end) {
                VITFAST_DISPATCH(assemble_rows(args, begin, end));
            });
        });
    });
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("patchify", TORCH_BOX(&vitfast::patchify));
    m.impl("unpatchify", TORCH_BOX(&vitfast::unpatchify));
    m.impl("assemble_tokens", TORCH_BOX(&vitfast::assemble_tokens));
}
