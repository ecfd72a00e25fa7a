// Operators on the kernels of patch_embed.cuh; bytes moved and floors are there.
#include <limits>

#include "launch.h"
#include "operators.h"
#include "patch_embed.cuh"

namespace vitfast::cuda {

namespace {

constexpr auto kFloat = ScalarType::Float;

// Checks `images` [B, C, Hi, Wi] against `patch` and describes how it is cut.
PatchGeometry patch_geometry(const char* name, const Tensor& images, int64_t patch) {
    if (images.dim() != 4) fail(name, " has shape ", show_shape(images), "; needed: [B, C, Hi, Wi]");
    const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
    if (patch < 1) fail("patch is ", patch, "; it must be at least 1");
    if (height % patch != 0 || width % patch != 0) {
        fail(name, " is ", height, " x ", width, " pixels; both sides must be a multiple of patch = ", patch);
    }
    if (height > std::numeric_limits<int>::max() || width > std::numeric_limits<int>::max() ||
        patch > std::numeric_limits<int>::max() / patch ||
        channels > std::numeric_limits<int>::max() / (patch * patch)) {
        fail(name, " has ", channels, " channels of ", patch, " x ", patch,
             " patches; a patch may hold at most 2^31 - 1 elements");
    }
    return {images.size(0),
            static_cast<int>(channels),
            static_cast<int>(height / patch),
            static_cast<int>(width / patch),
            static_cast<int>(patch),
            images.stride(0),
            images.stride(1),
            images.stride(2),
            images.stride(3)};
}

}  // namespace

void patchify(Tensor images, int64_t patch, Tensor scale, Tensor shift, Tensor patches) {
    const Arguments arguments("images", images);
    arguments.check_kind("images", images, {ScalarType::Byte, kFloat, ScalarType::BFloat16, ScalarType::Half});
    const PatchGeometry geometry = patch_geometry("images", images, patch);
    with_dtype("patches", patches, [&](auto y_type) {
        using Y = decltype(y_type);
        arguments.check("scale", scale, {kFloat}, {geometry.channels});
        arguments.check("shift", shift, {kFloat}, {geometry.channels});
        arguments.check("patches", patches, {patches.scalar_type()},
                        {geometry.patches(), int64_t{geometry.channels} * geometry.area()});
        Launcher launcher(images);
        const auto run = [&](auto in_type) {
            using In = decltype(in_type);
            const PatchifyArgs<In, Y> args{data<In>(images), data<float>(scale), data<float>(shift),
                                           mutable_data<Y>(patches), geometry};
            run_patchify(args, launcher);
        };
        if (images.scalar_type() == ScalarType::Byte) return run(uint8_t{});
        with_dtype("images", images, run);
    });
}

void unpatchify(Tensor d_patches, int64_t patch, Tensor scale, Tensor d_images) {
    const Arguments arguments("d_patches", d_patches);
    const PatchGeometry geometry = patch_geometry("d_images", d_images, patch);
    with_dtype("d_patches", d_patches, [&](auto y_type) {
        with_dtype("d_images", d_images, [&](auto out_type) {
            using Y = decltype(y_type);
            using Out = decltype(out_type);
            arguments.check("d_images", d_images, {d_images.scalar_type()}, {-1, -1, -1, -1});
            arguments.check("d_patches", d_patches, {d_patches.scalar_type()},
                            {geometry.patches(), int64_t{geometry.channels} * geometry.area()});
            arguments.check("scale", scale, {kFloat}, {geometry.channels});
            Launcher launcher(d_patches);
            const UnpatchifyArgs<Y, Out> args{data<Y>(d_patches), data<float>(scale), mutable_data<Out>(d_images),
                                              geometry};
            run_unpatchify(args, launcher);
        });
    });
}

void assemble_tokens(Tensor projected, OptionalTensor bias, OptionalTensor pos_embed, OptionalTensor prefix,
                     Tensor tokens) {
    with_dtypes("tokens", tokens, "projected", projected, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const Arguments arguments("projected", projected);
        arguments.check("tokens", tokens, {tokens.scalar_type()}, {-1, -1, -1});
        const int64_t images = tokens.size(0), count = tokens.size(1);
        const int width = checked_width("tokens", tokens.size(2), kMostColumns);
        arguments.check("prefix", prefix, {kFloat}, {-1, width});
        const int64_t prefix_tokens = prefix.has_value() ? prefix->size(0) : 0, patches = count - prefix_tokens;
        if (patches < 0 || count > std::numeric_limits<int>::max()) {
            fail("tokens has ", count, " tokens an image; needed: at least prefix's ", prefix_tokens,
                 ", at most 2^31 - 1");
        }
        arguments.check("projected", projected, {projected.scalar_type()}, {images * patches, width});
        arguments.check("bias", bias, {kFloat}, {width});
        arguments.check("pos_embed", pos_embed, {kFloat}, {-1, width});
        const int64_t positions = pos_embed.has_value() ? pos_embed->size(0) : 0;
        if (pos_embed.has_value() && positions != patches && positions != count) {
            fail("pos_embed has ", positions, " rows; allowed: ", patches, " (patches) or ", count,
                 " (prefix tokens and patches)");
        }
        const AssembleArgs<X, Y> args{data<Y>(projected),
                                      data<float>(bias),
                                      data<float>(pos_embed),
                                      data<float>(prefix),
                                      mutable_data<X>(tokens),
                                      static_cast<int>(patches),
                                      static_cast<int>(prefix_tokens),
                                      static_cast<int>(positions)};
        Launcher launcher(projected);
        run_assemble_tokens(args, images * count, width, launcher);
    });
}

}  // namespace vitfast::cuda
