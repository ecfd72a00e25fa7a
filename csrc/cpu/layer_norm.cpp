#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "forward.h"
#include "reduce.h"

// Shapes: T rows, D width, B samples (T % B == 0, T // B rows each). X: residual dtype, Y: compute dtype.
namespace vitfast {

template <class X, class Y>
struct LayerNormForward {
    const X* x;
    const Y* branch;
    const float *scale, *drop_path, *weight, *bias;
    float eps;
    X* total;
    Y* normed;  // null: scale_add_forward, only the total
    float *mean, *rstd;
    int64_t width, rows_per_sample;
    bf16* in_tiles;  // null, or where normed is written instead, in the order of TileRows
};

template <class X, class Y>
struct LayerNormApply {
    const X* total;
    const float *mean, *rstd, *weight, *bias;
    Y* normed;
    int64_t width;
};

template <class X, class Y>
struct LayerNormBackward {
    const Y* d_normed;
    const X *d_total, *total;
    const float *mean, *rstd, *weight;
    const Y* branch;
    const float *scale, *drop_path;
    X* d_x;
    Y* d_branch;
    bool d_scale;
    int64_t width, rows_per_sample;
};

}  // namespace vitfast

#define VITFAST_KERNEL "layer_norm_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

constexpr auto kFloat = ScalarType::Float;
constexpr auto kBFloat16 = ScalarType::BFloat16;
constexpr auto kCpu = Device::kCpu;

// Calls run(X{}, Y{}) for the dtypes of the residual stream and of the compute dtype.
template <class Run>
void with_dtypes(const char* x_name, const Tensor& x, const char* y_name, const Tensor& y, const Run& run) {
    check_kind(x_name, x, kCpu, {kFloat, kBFloat16});
    check_kind(y_name, y, kCpu, {kFloat, kBFloat16});
    const bool x_half = x.scalar_type() == kBFloat16, y_half = y.scalar_type() == kBFloat16;
    if (x_half && !y_half)
        fail(x_name, " is BFloat16 but ", y_name, " is Float; allowed: both alike, or Float with BFloat16");
    if (x_half) {
        run(bf16{}, bf16{});
    } else if (y_half) {
        run(float{}, bf16{});
    } else {
        run(float{}, float{});
    }
}

// Rows per sample for drop_path[B]; T for none.
int64_t rows_per_sample(const OptionalTensor& drop_path, int64_t rows) {
    check("drop_path", drop_path, kCpu, {kFloat}, {-1});
    if (!drop_path.has_value()) return std::max<int64_t>(rows, 1);
    const int64_t samples = drop_path->numel();
    if (samples == 0 ? rows != 0 : rows % samples != 0) {
        fail("drop_path has ", samples, " samples; the number of rows, ", rows, ", must be a multiple of it");
    }
    return samples == 0 ? 1 : std::max<int64_t>(rows / samples, 1);
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)); }

}  // namespace

// in_tiles: where normed is written in the order of TileRows; the tensor then gives shape and dtype alone.
void layer_norm_forward(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor weight,
                        Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean, Tensor rstd,
                        bf16* in_tiles) {
    with_dtypes("x", x, "normed", normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        check("x", x, kCpu, {x.scalar_type()}, {-1, -1});
        const int64_t rows = x.size(0), width = x.size(1);
        check("branch", branch, kCpu, {normed.scalar_type()}, {rows, width});
        check("scale", scale, kCpu, {kFloat}, {width});
        check("weight", weight, kCpu, {kFloat}, {width});
        check("bias", bias, kCpu, {kFloat}, {width});
        check_together("total", total, "branch", branch);
        check("total", total, kCpu, {x.scalar_type()}, {rows, width});
        check("normed", normed, kCpu, {normed.scalar_type()}, {rows, width});
        check("mean", mean, kCpu, {kFloat}, {rows});
        check("rstd", rstd, kCpu, {kFloat}, {rows});
        const LayerNormForward<X, Y> args{data<X>(x),
                                          data<Y>(branch),
                                          data<float>(scale),
                                          data<float>(drop_path),
                                          data<float>(weight),
                                          data<float>(bias),
                                          static_cast<float>(eps),
                                          mutable_data<X>(total),
                                          mutable_data<Y>(normed),
                                          mutable_data<float>(mean),
                                          mutable_data<float>(rstd),
                                          width,
                                          rows_per_sample(drop_path, rows),
                                          in_tiles};
        torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            VITFAST_DISPATCH(layer_norm_forward_rows(args, begin, end));
        });
    });
}

namespace {

void layer_norm_forward_op(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path,
                           Tensor weight, Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean,
                           Tensor rstd) {
    layer_norm_forward(x, branch, scale, drop_path, weight, bias, eps, total, normed, mean, rstd);
}

void scale_add_forward(Tensor residual, Tensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor total) {
    with_dtypes("residual", residual, "branch", branch, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        check("residual", residual, kCpu, {residual.scalar_type()}, {-1, -1});
        const int64_t rows = residual.size(0), width = residual.size(1);
        check("branch", branch, kCpu, {branch.scalar_type()}, {rows, width});
        check("scale", scale, kCpu, {kFloat}, {width});
        check("total", total, kCpu, {residual.scalar_type()}, {rows, width});
        LayerNormForward<X, Y> args{};
        args.x = data<X>(residual);
        args.branch = data<Y>(branch);
        args.scale = data<float>(scale);
        args.drop_path = data<float>(drop_path);
        args.total = mutable_data<X>(total);
        args.width = width;
        args.rows_per_sample = rows_per_sample(drop_path, rows);
        torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            VITFAST_DISPATCH(layer_norm_forward_rows(args, begin, end));
        });
    });
}

void layer_norm_apply(Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor normed) {
    with_dtypes("total", total, "normed", normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        check("total", total, kCpu, {total.scalar_type()}, {-1, -1});
        const int64_t rows = total.size(0), width = total.size(1);
        check("mean", mean, kCpu, {kFloat}, {rows});
        check("rstd", rstd, kCpu, {kFloat}, {rows});
        check("weight", weight, kCpu, {kFloat}, {width});
        check("bias", bias, kCpu, {kFloat}, {width});
        check("normed", normed, kCpu, {normed.scalar_type()}, {rows, width});
        const LayerNormApply<X, Y> args{data<X>(total),
                                        data<float>(mean),
                                        data<float>(rstd),
                                        data<float>(weight),
                                        data<float>(bias),
                                        mutable_data<Y>(normed),
                                        width};
        torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
            VITFAST_DISPATCH(layer_norm_apply_rows(args, begin, end));
        });
    });
}

void layer_norm_backward(Tensor d_normed, OptionalTensor d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight,
                         OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor d_x,
                         OptionalTensor d_branch, OptionalTensor d_scale, Tensor d_weight, Tensor d_bias) {
    with_dtypes("total", total, "d_normed", d_normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const auto x_dtype = total.scalar_type(), y_dtype = d_normed.scalar_type();
        check("total", total, kCpu, {x_dtype}, {-1, -1});
        const int64_t rows = total.size(0), width = total.size(1);
        check("d_normed", d_normed, kCpu, {y_dtype}, {rows, width});
        check("d_total", d_total, kCpu, {x_dtype}, {rows, width});
        check("mean", mean, kCpu, {kFloat}, {rows});
        check("rstd", rstd, kCpu, {kFloat}, {rows});
        check("weight", weight, kCpu, {kFloat}, {width});
        check("branch", branch, kCpu, {y_dtype}, {rows, width});
        check("scale", scale, kCpu, {kFloat}, {width});
        check("d_x", d_x, kCpu, {x_dtype}, {rows, width});
        check("d_branch", d_branch, kCpu, {y_dtype}, {rows, width});
        check("d_scale", d_scale, kCpu, {kFloat}, {width});
        check("d_weight", d_weight, kCpu, {kFloat}, {width});
        check("d_bias", d_bias, kCpu, {kFloat}, {width});
        if (d_scale.has_value() && !branch.has_value()) fail("branch is None; d_scale needs it");
        const LayerNormBackward<X, Y> args{data<Y>(d_normed),
                                           data<X>(d_total),
                                           data<X>(total),
                                           data<float>(mean),
                                           data<float>(rstd),
                                           data<float>(weight),
                                           data<Y>(branch),
                                           data<float>(scale),
                                           data<float>(drop_path),
                                           mutable_data<X>(d_x),
                                           mutable_data<Y>(d_branch),
                                           d_scale.has_value(),
                                           width,
                                           rows_per_sample(drop_path, rows)};
        ColumnSums sums(rows, 3 * width);
        sums.accumulate([&](int64_t begin, int64_t end, float* partial) {
            VITFAST_DISPATCH(layer_norm_backward_rows(args, begin, end, partial));
        });
        sums.finish(mutable_data<float>(d_weight), 0, width);
        sums.finish(mutable_data<float>(d_bias), width, width);
        if (d_scale.has_value()) sums.finish(mutable_data<float>(d_scale), 2 * width, width);
    });
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("layer_norm_forward", TORCH_BOX(&vitfast::layer_norm_forward_op));
    m.impl("layer_norm_apply", TORCH_BOX(&vitfast::layer_norm_apply));
    m.impl("layer_norm_backward", TORCH_BOX(&vitfast::layer_norm_backward));
    m.impl("scale_add_forward", TORCH_BOX(&vitfast::scale_add_forward));
}
