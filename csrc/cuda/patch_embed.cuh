// Patch embedding around its product: patchify (normalise and im2col), its gradient unpatchify, and assemble_tokens
// (bias, position embedding, prefix tokens). The product itself goes to cuBLAS: K = C * P * P = 768 makes it
// compute-bound there.
//
// Bytes and the time at 4.3 TB/s for ViT-B/16 at 224 px and batch 256 (38.5 M pixels in, 38.7 M token elements out):
//   patchify uint8 -> bf16          1 + 2  B a pixel     27 us
//   patchify f32 -> bf16            4 + 2  B a pixel     54 us
//   unpatchify bf16 -> bf16         2 + 2  B a pixel     36 us
//   assemble_tokens bf16 -> bf16    2 + 2  B an element  36 us
#pragma once

#include "patch_index.h"
#include "team.cuh"
#include "vector_io.h"

namespace vitfast::cuda {

constexpr int kPatchVec = 4;

template <typename In, typename Y>
struct PatchifyArgs {
    const In* images;    // [B, C, Hi, Wi], strides in geometry
    const float* scale;  // [C]
    const float* shift;  // [C]
    Y* patches;          // [B * N, C * P * P]
    PatchGeometry geometry;
};

// Channels of a run that are loaded before the first is stored.
constexpr int kChannelsInFlight = 3;

template <int VEC, bool CONTIGUOUS_RUN, typename In>
__device__ __forceinline__ Raw<In, VEC> load_run(const In* plane, const int64_t (&pixel)[VEC]) {
    if constexpr (CONTIGUOUS_RUN) {
        return load<VEC>(plane + pixel[0]);
    } else {
        Raw<In, VEC> run;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            run.pack[0].item[i] = plane[pixel[i]];
        }
        return run;
    }
}

// CONTIGUOUS_RUN: the VEC pixels of a run are neighbours in memory and aligned, so they load as one vector; otherwise
// (channels last, P not a multiple of 4, odd offsets) each pixel is gathered, and channels that share lines meet in L1.
template <typename In, typename Y, int VEC, bool CONTIGUOUS_RUN>
__global__ void __launch_bounds__(kPatchThreads)
    patchify_kernel(const PatchifyArgs<In, Y> args, const PatchShape shape) {
    const PatchGeometry& geometry = args.geometry;
    const int slot = shape.slot_of(threadIdx.x);
    if (slot >= shape.slots) {
        return;
    }
    const In* const images = args.images;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * shape.slots;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * shape.slots + slot; row < geometry.patches(); row += stride) {
        const int64_t corner = geometry.corner_offset(row);
        for (int item = shape.lane_of(threadIdx.x); item < shape.items; item += shape.lanes) {
            int p = item * VEC / geometry.patch;
            int q = item * VEC - p * geometry.patch;
            int64_t pixel[VEC];
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                pixel[i] = corner + p * geometry.stride_h + q * geometry.stride_w;
                if (++q == geometry.patch) {
                    q = 0;
                    ++p;
                }
            }
            Y* const out = args.patches + geometry.row_offset(row) + item * VEC;
            for (int first = 0; first < geometry.channels; first += kChannelsInFlight) {
                Raw<In, VEC> run[kChannelsInFlight] = {};
#pragma unroll
                for (int i = 0; i < kChannelsInFlight; ++i) {
                    if (first + i < geometry.channels) {
                        run[i] = load_run<VEC, CONTIGUOUS_RUN>(images + (first + i) * geometry.stride_c, pixel);
                    }
                }
#pragma unroll
                for (int i = 0; i < kChannelsInFlight; ++i) {
                    const int channel = first + i;
                    if (channel < geometry.channels) {
                        const float scale = args.scale[channel];
                        const float shift = args.shift[channel];
                        float value[VEC];
#pragma unroll
                        for (int j = 0; j < VEC; ++j) {
                            value[j] = fmaf(run[i][j], scale, shift);
                        }
                        store<VEC>(out + channel * geometry.area(), value);
                    }
                }
            }
        }
    }
}

template <typename Y, typename Out>
struct UnpatchifyArgs {
    const Y* d_patches;  // [B * N, C * P * P]
    const float* scale;  // [C]
    Out* d_images;       // [B, C, Hi, Wi], contiguous
    PatchGeometry geometry;
};

template <typename Y, typename Out, int VEC, bool CONTIGUOUS_RUN>
__global__ void __launch_bounds__(kPatchThreads)
    unpatchify_kernel(const UnpatchifyArgs<Y, Out> args, const PatchShape shape) {
    const PatchGeometry& geometry = args.geometry;
    const int slot = shape.slot_of(threadIdx.x);
    if (slot >= shape.slots) {
        return;
    }
    const int64_t stride = static_cast<int64_t>(gridDim.x) * shape.slots;
    for (int64_t row = static_cast<int64_t>(blockIdx.x) * shape.slots + slot; row < geometry.patches(); row += stride) {
        const int64_t corner = geometry.corner_offset(row);
        for (int item = shape.lane_of(threadIdx.x); item < shape.items; item += shape.lanes) {
            const int first_p = item * VEC / geometry.patch;
            const int first_q = item * VEC - first_p * geometry.patch;
            const Y* __restrict__ in = args.d_patches + geometry.row_offset(row) + item * VEC;
#pragma unroll 3
            for (int channel = 0; channel < geometry.channels; ++channel) {
                const Raw<Y, VEC> d_patch = load<VEC>(in + channel * geometry.area());
                float value[VEC];
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    value[i] = args.scale[channel] * d_patch[i];
                }
                Out* __restrict__ plane = args.d_images + corner + channel * geometry.stride_c;
                if constexpr (CONTIGUOUS_RUN) {
                    store<VEC>(plane + first_p * geometry.stride_h + first_q, value);
                } else {
                    int p = first_p;
                    int q = first_q;
#pragma unroll
                    for (int i = 0; i < VEC; ++i) {
                        plane[p * geometry.stride_h + q * geometry.stride_w] = static_cast<Out>(value[i]);
                        if (++q == geometry.patch) {
                            q = 0;
                            ++p;
                        }
                    }
                }
            }
        }
    }
}

template <typename X, typename Y>
struct AssembleArgs {
    const Y* projected;      // [B * N, D]
    const float* bias;       // [D] or null
    const float* pos_embed;  // [N or R + N, D] or null
    const float* prefix;     // [R, D] or null
    X* tokens;               // [B, R + N, D]
    int patches_per_image;   // N
    int prefix_tokens;       // R
    int position_rows;       // N, R + N, or 0 without pos_embed
};

template <typename X, typename Y, int VEC>
__global__ void __launch_bounds__(kPatchThreads)
    assemble_tokens_kernel(const AssembleArgs<X, Y> args, const TeamShape shape) {
    const Team team(shape);
    for (int64_t row = shape.first_row(blockIdx.x, team.index); row < shape.rows; row += shape.row_stride()) {
        const TokenSource source = token_source(row, args.patches_per_image, args.prefix_tokens, args.position_rows);
        const int64_t width = shape.width;
#pragma unroll 4
        for (int column = team.lane * VEC; column < shape.width; column += team.lanes * VEC) {
            float value[VEC];
            if (source.prefix_row >= 0) {
                const Raw<float, VEC> prefix = load<VEC>(args.prefix + source.prefix_row * width + column);
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    value[i] = prefix[i];
                }
            } else {
                const Raw<Y, VEC> projected = load<VEC>(args.projected + source.projected_row * width + column);
                Raw<float, VEC> bias = {};
                if (args.bias) {
                    bias = load<VEC>(args.bias + column);
                }
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    value[i] = projected[i] + bias[i];
                }
            }
            if (source.position_row >= 0) {
                const Raw<float, VEC> position = load<VEC>(args.pos_embed + source.position_row * width + column);
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    value[i] += position[i];
                }
            }
            store<VEC>(args.tokens + row * width + column, value);
        }
    }
}

// Whether every run of kPatchVec pixels starts at an address that is a multiple of its size.
inline bool runs_are_contiguous(const PatchGeometry& geometry, const void* images, int64_t element_size) {
    return geometry.stride_w == 1 && geometry.patch % kPatchVec == 0 && geometry.stride_h % kPatchVec == 0 &&
           geometry.stride_c % kPatchVec == 0 && geometry.stride_b % kPatchVec == 0 &&
           reinterpret_cast<uintptr_t>(images) % (kPatchVec * element_size) == 0;
}

template <typename In, typename Y, typename Launcher>
void run_patchify(const PatchifyArgs<In, Y>& args, Launcher& launcher) {
    const PatchGeometry& geometry = args.geometry;
    if (geometry.patches() == 0 || geometry.channels == 0) {
        return;
    }
    const bool vectorize = geometry.area() % kPatchVec == 0 && is_aligned(args.patches);
    const bool runs = vectorize && runs_are_contiguous(geometry, args.images, sizeof(In));
    const PatchShape shape = make_patch_shape(geometry.patches(), geometry.area(), vectorize ? kPatchVec : 1,
                                              kMostResidentThreads, launcher.multiprocessors());
    const auto kernel = runs        ? patchify_kernel<In, Y, kPatchVec, true>
                        : vectorize ? patchify_kernel<In, Y, kPatchVec, false>
                                    : patchify_kernel<In, Y, 1, false>;
    launcher("patchify", kernel, dim3(shape.blocks), dim3(kPatchThreads), args, shape);
}

template <typename Y, typename Out, typename Launcher>
void run_unpatchify(const UnpatchifyArgs<Y, Out>& args, Launcher& launcher) {
    const PatchGeometry& geometry = args.geometry;
    if (geometry.patches() == 0 || geometry.channels == 0) {
        return;
    }
    const bool vectorize = geometry.area() % kPatchVec == 0 && is_aligned(args.d_patches);
    const bool runs = vectorize && runs_are_contiguous(geometry, args.d_images, sizeof(Out));
    const PatchShape shape = make_patch_shape(geometry.patches(), geometry.area(), vectorize ? kPatchVec : 1,
                                              kMostResidentThreads, launcher.multiprocessors());
    const auto kernel = runs        ? unpatchify_kernel<Y, Out, kPatchVec, true>
                        : vectorize ? unpatchify_kernel<Y, Out, kPatchVec, false>
                                    : unpatchify_kernel<Y, Out, 1, false>;
    launcher("unpatchify", kernel, dim3(shape.blocks), dim3(kPatchThreads), args, shape);
}

// width >= 1; rows = B * (R + N).
template <typename X, typename Y, typename Launcher>
void run_assemble_tokens(const AssembleArgs<X, Y>& args, int64_t rows, int width, Launcher& launcher) {
    if (rows == 0 || width == 0) {
        return;
    }
    constexpr int kVec = vector_width<X, Y>();
    const bool vectorize =
        can_vectorize(width, kVec, args.projected, args.bias, args.pos_embed, args.prefix, args.tokens);
    const TeamShape shape =
        make_team_shape(rows, width, 1, kPatchThreads / kWarpSize, kMostResidentThreads, launcher.multiprocessors());
    const auto kernel = vectorize ? assemble_tokens_kernel<X, Y, kVec> : assemble_tokens_kernel<X, Y, 1>;
    launcher("assemble_tokens", kernel, dim3(shape.blocks), dim3(shape.threads()), args, shape);
}

}  // namespace vitfast::cuda
