// Where patch elements lie. An image [B, C, Hi, Wi] of any strides is cut into grid_h x grid_w patches of P x P pixels;
// row b * N + gy * grid_w + gx of the patch matrix holds that patch in (c, p, q) order, N = grid_h * grid_w.
#pragma once

#include "host_device.h"

namespace vitfast::cuda {

struct PatchGeometry {
    int64_t images;  // B
    int channels;    // C
    int grid_h;
    int grid_w;
    int patch;         // P
    int64_t stride_b;  // strides of the image, in elements; may be 0 (expanded) or negative
    int64_t stride_c;
    int64_t stride_h;
    int64_t stride_w;

    VITFAST_HOST_DEVICE int64_t patches() const { return images * grid_h * grid_w; }
    VITFAST_HOST_DEVICE int area() const { return patch * patch; }
    // First element of a patch in the patch matrix.
    VITFAST_HOST_DEVICE int64_t row_offset(int64_t row) const { return row * channels * area(); }
    // Offset of pixel (0, 0, 0) of a patch in the image.
    VITFAST_HOST_DEVICE int64_t corner_offset(int64_t row) const {
        const int64_t line = fast_div(row, grid_w);  // b * grid_h + gy
        const int64_t image = fast_div(line, grid_h);
        const int64_t gy = line - image * grid_h;
        const int64_t gx = row - line * grid_w;
        return image * stride_b + gy * patch * stride_h + gx * patch * stride_w;
    }
};

constexpr int kPatchThreads = 256;

// A block takes `slots` patches at a time; a patch is `items` runs of VEC elements (per channel). Thread t works on
// runs t % items, t % items + lanes, ... of slot t / items; threads past slots * lanes idle.
struct PatchShape {
    int items;  // P * P / VEC
    int lanes;  // min(items, threads of a block)
    int slots;  // patches per block and step
    int blocks;

    VITFAST_HOST_DEVICE int slot_of(int thread) const { return thread / lanes; }
    VITFAST_HOST_DEVICE int lane_of(int thread) const { return thread % lanes; }
};

inline PatchShape make_patch_shape(int64_t patches, int area, int vec, int resident_threads, int multiprocessors) {
    PatchShape shape{};
    shape.items = area / vec;
    shape.lanes = shape.items < kPatchThreads ? shape.items : kPatchThreads;
    shape.slots = kPatchThreads / shape.lanes;
    const int64_t wave = static_cast<int64_t>(multiprocessors) * (resident_threads / kPatchThreads);
    const int64_t needed = ceil_div(patches, shape.slots);
    shape.blocks = static_cast<int>(needed < wave ? needed : wave);
    return shape;
}

// Where token row b * (R + N) + t comes from.
struct TokenSource {
    int64_t projected_row;  // row of the projected patches, -1 for a prefix token
    int prefix_row;         // row of prefix, -1 for a patch
    int position_row;       // row of pos_embed, -1 where it has none
};

// position_rows is N, R + N, or 0 without a position embedding. With R = 0 the two lengths are one.
VITFAST_HOST_DEVICE TokenSource token_source(int64_t row, int patches_per_image, int prefix_tokens, int position_rows) {
    const int tokens = prefix_tokens + patches_per_image;
    const int64_t image = fast_div(row, tokens);
    const int token = static_cast<int>(row - image * tokens);
    const bool is_prefix = token < prefix_tokens;
    const int position = token - (tokens - position_rows);
    return {is_prefix ? -1 : image * patches_per_image + token - prefix_tokens, is_prefix ? token : -1,
            position_rows > 0 && position >= 0 ? position : -1};
}

}  // namespace vitfast::cuda
