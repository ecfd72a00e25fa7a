// The kernels of csrc/cuda, run by cuda_emulator.h (-include it) and called from Python through ctypes. Tensors come as
// addresses (0 for None) and dtypes as numbers; every function returns null or the text of an error.
#include "activation.cuh"
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"
#include "patch_embed.cuh"

using namespace vitfast::cuda;
using emulator::CountedFloat;

namespace {

enum Dtype { kFloat32, kBFloat16, kFloat16, kUInt8 };

emulator::Launcher launcher{1, false};
std::string last_error;

template <typename Run>
const char* guarded(const Run& run) {
    try {
        run();
        return nullptr;
    } catch (const std::exception& error) {
        last_error = error.what();
        return last_error.c_str();
    }
}

template <typename Run>
void with_dtype(int dtype, const Run& run) {
    if (dtype == kFloat32) return run(CountedFloat{});
    if (dtype == kBFloat16) return run(BFloat16{});
    throw std::runtime_error("dtype");
}

// Of the five pairs, the three that differ in more than the conversion of one 16-bit type or the other.
template <typename Run>
void with_dtypes(int x_dtype, int y_dtype, const Run& run) {
    if (x_dtype == kFloat32 && y_dtype == kFloat32) return run(CountedFloat{}, CountedFloat{});
    if (x_dtype == kFloat32 && y_dtype == kBFloat16) return run(CountedFloat{}, BFloat16{});
    if (x_dtype == kFloat16 && y_dtype == kFloat16) return run(Half{}, Half{});
    throw std::runtime_error("dtypes");
}

template <typename T>
T* pointer(const int64_t* addresses, int i) {
    return reinterpret_cast<T*>(addresses[i]);
}

template <typename Run>
void with_kind(int kind, const Run& run) {
    switch (kind) {
        case 0:
            return run(std::integral_constant<Activation, Activation::kGelu>{});
        case 1:
            return run(std::integral_constant<Activation, Activation::kGeluTanh>{});
        case 2:
            return run(std::integral_constant<Activation, Activation::kQuickGelu>{});
        case 3:
            return run(std::integral_constant<Activation, Activation::kSwiGlu>{});
    }
    throw std::runtime_error("kind");
}

const float* floats(const int64_t* addresses, int i) { return pointer<float>(addresses, i); }

}  // namespace

extern "C" {

void configure(int multiprocessors, int reverse) { launcher = {multiprocessors, reverse != 0}; }

void watch(int64_t address, int64_t count, int64_t counts) {
    CountedFloat::watched = reinterpret_cast<CountedFloat*>(address);
    CountedFloat::watched_count = count;
    CountedFloat::counts = reinterpret_cast<int32_t*>(counts);
}

// x, branch, scale, drop_path, weight, bias, total, normed, mean, rstd; without normed: scale_add_forward.
const char* layer_norm_forward(int x_dtype, int y_dtype, const int64_t* a, int64_t rows, int width,
                               int64_t rows_per_sample, float eps) {
    return guarded([&] {
        with_dtypes(x_dtype, y_dtype, [&](auto x, auto y) {
            using X = decltype(x);
            using Y = decltype(y);
            const LayerNormForwardArgs<X, Y> args{pointer<X>(a, 0),     pointer<Y>(a, 1), floats(a, 2),
                                                  floats(a, 3),         floats(a, 4),     floats(a, 5),
                                                  pointer<X>(a, 6),     pointer<Y>(a, 7), pointer<float>(a, 8),
                                                  pointer<float>(a, 9), rows_per_sample,  eps};
            a[7] ? run_layer_norm_forward(args, rows, width, launcher)
                 : run_scale_add_forward(args, rows, width, launcher);
        });
    });
}

// total, mean, rstd, weight, bias, normed
const char* layer_norm_apply(int x_dtype, int y_dtype, const int64_t* a, int64_t rows, int width) {
    return guarded([&] {
        with_dtypes(x_dtype, y_dtype, [&](auto x, auto y) {
            using X = decltype(x);
            using Y = decltype(y);
            const LayerNormApplyArgs<X, Y> args{pointer<X>(a, 0), floats(a, 1), floats(a, 2),
                                                floats(a, 3),     floats(a, 4), pointer<Y>(a, 5)};
            run_layer_norm_apply(args, rows, width, launcher);
        });
    });
}

// d_normed, d_total, total, mean, rstd, weight, branch, scale, drop_path, d_x, d_branch, d_scale, d_weight, d_bias
const char* layer_norm_backward(int x_dtype, int y_dtype, const int64_t* a, int64_t rows, int width,
                                int64_t rows_per_sample) {
    return guarded([&] {
        with_dtypes(x_dtype, y_dtype, [&](auto x, auto y) {
            using X = decltype(x);
            using Y = decltype(y);
            const bool has_branch = a[10] || a[11];
            std::vector<float> partial(backward_workspace_size(rows, width, has_branch, launcher.processors), NAN);
            const LayerNormBackwardArgs<X, Y> args{
                pointer<Y>(a, 0),      pointer<X>(a, 1),      pointer<X>(a, 2),  floats(a, 3),
                floats(a, 4),          floats(a, 5),          pointer<Y>(a, 6),  floats(a, 7),
                floats(a, 8),          pointer<X>(a, 9),      pointer<Y>(a, 10), pointer<float>(a, 11),
                pointer<float>(a, 12), pointer<float>(a, 13), partial.data(),    rows_per_sample};
            run_layer_norm_backward(args, rows, width, launcher);
        });
    });
}

// h, out
const char* activation_forward(int dtype, const int64_t* a, int kind, int64_t rows, int width) {
    return guarded([&] {
        with_dtype(dtype, [&](auto y) {
            using Y = decltype(y);
            with_kind(kind, [&](auto activation) {
                run_activation_forward<Y, activation.value>(pointer<Y>(a, 0), pointer<Y>(a, 1), rows, width, launcher);
            });
        });
    });
}

// h, d_act, d_h, act, d_bias
const char* activation_backward(int dtype, const int64_t* a, int kind, int64_t rows, int width) {
    return guarded([&] {
        with_dtype(dtype, [&](auto y) {
            using Y = decltype(y);
            const auto size = activation_workspace_size<Y>(Activation(kind), rows, width, launcher.processors);
            std::vector<float> partial(size, NAN);
            const ActivationBackwardArgs<Y> args{pointer<Y>(a, 0),
                                                 pointer<Y>(a, 1),
                                                 pointer<Y>(a, 2),
                                                 pointer<Y>(a, 3),
                                                 pointer<float>(a, 4),
                                                 partial.data(),
                                                 rows,
                                                 width};
            with_kind(kind, [&](auto activation) { run_activation_backward<Y, activation.value>(args, launcher); });
        });
    });
}

// images, scale, shift, patches; geometry: B, C, grid_h, grid_w, P, stride_b, stride_c, stride_h, stride_w
static PatchGeometry geometry_of(const int64_t* g) {
    return {g[0], int(g[1]), int(g[2]), int(g[3]), int(g[4]), g[5], g[6], g[7], g[8]};
}

const char* patchify(int in_dtype, int y_dtype, const int64_t* a, const int64_t* g) {
    return guarded([&] {
        with_dtype(y_dtype, [&](auto y) {
            using Y = decltype(y);
            const auto run = [&](auto in) {
                using In = decltype(in);
                const PatchifyArgs<In, Y> args{pointer<In>(a, 0), floats(a, 1), floats(a, 2), pointer<Y>(a, 3),
                                               geometry_of(g)};
                run_patchify(args, launcher);
            };
            in_dtype == kUInt8 ? run(uint8_t{}) : with_dtype(in_dtype, run);
        });
    });
}

// d_patches, scale, d_images
const char* unpatchify(int y_dtype, int out_dtype, const int64_t* a, const int64_t* g) {
    return guarded([&] {
        with_dtype(y_dtype, [&](auto y) {
            with_dtype(out_dtype, [&](auto out) {
                using Y = decltype(y);
                using Out = decltype(out);
                const UnpatchifyArgs<Y, Out> args{pointer<Y>(a, 0), floats(a, 1), pointer<Out>(a, 2), geometry_of(g)};
                run_unpatchify(args, launcher);
            });
        });
    });
}

// projected, bias, pos_embed, prefix, tokens
const char* assemble_tokens(int x_dtype, int y_dtype, const int64_t* a, int64_t images, int patches, int prefix_tokens,
                            int position_rows, int width) {
    return guarded([&] {
        with_dtypes(x_dtype, y_dtype, [&](auto x, auto y) {
            using X = decltype(x);
            using Y = decltype(y);
            const AssembleArgs<X, Y> args{pointer<Y>(a, 0), floats(a, 1), floats(a, 2),  floats(a, 3),
                                          pointer<X>(a, 4), patches,      prefix_tokens, position_rows};
            run_assemble_tokens(args, images * (patches + prefix_tokens), width, launcher);
        });
    });
}

// Index maps alone, for sizes that no test can allocate.
int64_t patch_corner_offset(const int64_t* g, int64_t row) { return geometry_of(g).corner_offset(row); }

int64_t patch_row_offset(const int64_t* g, int64_t row) { return geometry_of(g).row_offset(row); }

void find_token_source(int64_t row, int patches, int prefix_tokens, int position_rows, int64_t* out) {
    const TokenSource source = token_source(row, patches, prefix_tokens, position_rows);
    out[0] = source.projected_row;
    out[1] = source.prefix_row;
    out[2] = source.position_row;
}

// warps, teams, blocks and the row after first_row(blocks - 1, teams - 1)
void find_team_shape(int64_t rows, int width, int kind, int multiprocessors, int64_t* out) {
    const TeamShape shape = kind == 0 ? forward_shape(rows, width, multiprocessors)
                                      : backward_shape(rows, width, kind == 2, multiprocessors);
    out[0] = shape.warps;
    out[1] = shape.teams;
    out[2] = shape.blocks;
    out[3] = shape.blocks > 0 ? shape.first_row(shape.blocks - 1, shape.teams - 1) + 1 : 0;
}

int64_t divide(int64_t a, int64_t b) { return fast_div(a, b); }
}
