// Operators on the kernels of layer_norm_forward.cuh; bytes moved and floors are there.
#include "launch.h"
#include "layer_norm_forward.cuh"
#include "operators.h"

namespace vitfast::cuda {

constexpr auto kFloat = ScalarType::Float;

void layer_norm_forward(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor weight,
                        Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean, Tensor rstd) {
    with_dtypes("x", x, "normed", normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const Arguments arguments("x", x);
        arguments.check("x", x, {x.scalar_type()}, {-1, -1});
        const int64_t rows = x.size(0), width = x.size(1);
        arguments.check("branch", branch, {normed.scalar_type()}, {rows, width});
        arguments.check("scale", scale, {kFloat}, {width});
        arguments.check("weight", weight, {kFloat}, {width});
        arguments.check("bias", bias, {kFloat}, {width});
        check_together("total", total, "branch", branch);
        arguments.check("total", total, {x.scalar_type()}, {rows, width});
        arguments.check("normed", normed, {normed.scalar_type()}, {rows, width});
        arguments.check("mean", mean, {kFloat}, {rows});
        arguments.check("rstd", rstd, {kFloat}, {rows});
        const LayerNormForwardArgs<X, Y> args{data<X>(x),
                                              data<Y>(branch),
                                              data<float>(scale),
                                              data<float>(drop_path),
                                              data<float>(weight),
                                              data<float>(bias),
                                              mutable_data<X>(total),
                                              mutable_data<Y>(normed),
                                              mutable_data<float>(mean),
                                              mutable_data<float>(rstd),
                                              arguments.rows_per_sample(drop_path, rows),
                                              static_cast<float>(eps)};
        Launcher launcher(x);
        run_layer_norm_forward(args, rows, checked_width("x", width, kMaxWidth), launcher);
    });
}

void layer_norm_apply(Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor normed) {
    with_dtypes("total", total, "normed", normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const Arguments arguments("total", total);
        arguments.check("total", total, {total.scalar_type()}, {-1, -1});
        const int64_t rows = total.size(0), width = total.size(1);
        arguments.check("mean", mean, {kFloat}, {rows});
        arguments.check("rstd", rstd, {kFloat}, {rows});
        arguments.check("weight", weight, {kFloat}, {width});
        arguments.check("bias", bias, {kFloat}, {width});
        arguments.check("normed", normed, {normed.scalar_type()}, {rows, width});
        const LayerNormApplyArgs<X, Y> args{data<X>(total),      data<float>(mean), data<float>(rstd),
                                            data<float>(weight), data<float>(bias), mutable_data<Y>(normed)};
        Launcher launcher(total);
        run_layer_norm_apply(args, rows, checked_width("total", width, kMaxWidth), launcher);
    });
}

void scale_add_forward(Tensor residual, Tensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor total) {
    with_dtypes("residual", residual, "branch", branch, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const Arguments arguments("residual", residual);
        arguments.check("residual", residual, {residual.scalar_type()}, {-1, -1});
        const int64_t rows = residual.size(0), width = residual.size(1);
        arguments.check("branch", branch, {branch.scalar_type()}, {rows, width});
        arguments.check("scale", scale, {kFloat}, {width});
        arguments.check("total", total, {residual.scalar_type()}, {rows, width});
        LayerNormForwardArgs<X, Y> args{};
        args.x = data<X>(residual);
        args.branch = data<Y>(branch);
        args.scale = data<float>(scale);
        args.drop_path = data<float>(drop_path);
        args.rows_per_sample = arguments.rows_per_sample(drop_path, rows);
        args.total = mutable_data<X>(total);
        Launcher launcher(residual);
        run_scale_add_forward(args, rows, checked_width("residual", width, kMaxWidth), launcher);
    });
}

}  // namespace vitfast::cuda
