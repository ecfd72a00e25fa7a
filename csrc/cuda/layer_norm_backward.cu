// Operator on the kernels of layer_norm_backward.cuh; bytes moved and floors are there.
#include <torch/csrc/stable/ops.h>

#include "launch.h"
#include "layer_norm_backward.cuh"
#include "operators.h"

namespace vitfast::cuda {

void layer_norm_backward(Tensor d_normed, OptionalTensor d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight,
                         OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor d_x,
                         OptionalTensor d_branch, OptionalTensor d_scale, Tensor d_weight, Tensor d_bias) {
    constexpr auto kFloat = ScalarType::Float;
    with_dtypes("total", total, "d_normed", d_normed, [&](auto x_type, auto y_type) {
        using X = decltype(x_type);
        using Y = decltype(y_type);
        const auto x_dtype = total.scalar_type(), y_dtype = d_normed.scalar_type();
        const Arguments arguments("total", total);
        arguments.check("total", total, {x_dtype}, {-1, -1});
        const int64_t rows = total.size(0);
        const int width = checked_width("total", total.size(1), kMaxWidth);
        arguments.check("d_normed", d_normed, {y_dtype}, {rows, width});
        arguments.check("d_total", d_total, {x_dtype}, {rows, width});
        arguments.check("mean", mean, {kFloat}, {rows});
        arguments.check("rstd", rstd, {kFloat}, {rows});
        arguments.check("weight", weight, {kFloat}, {width});
        arguments.check("branch", branch, {y_dtype}, {rows, width});
        arguments.check("scale", scale, {kFloat}, {width});
        arguments.check("d_x", d_x, {x_dtype}, {rows, width});
        arguments.check("d_branch", d_branch, {y_dtype}, {rows, width});
        arguments.check("d_scale", d_scale, {kFloat}, {width});
        arguments.check("d_weight", d_weight, {kFloat}, {width});
        arguments.check("d_bias", d_bias, {kFloat}, {width});
        if (d_scale.has_value() && !branch.has_value())
            fail("branch is None but d_scale is given: it needs the branch");
        const int64_t rows_per_sample = arguments.rows_per_sample(drop_path, rows);
        if (width == 0) return;

        Launcher launcher(total);
        const bool has_branch = d_branch.has_value() || d_scale.has_value();
        const Tensor partial = torch::stable::new_empty(
            weight, {backward_workspace_size(rows, width, has_branch, launcher.multiprocessors())});
        const LayerNormBackwardArgs<X, Y> args{data<Y>(d_normed),
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
                                               mutable_data<float>(d_scale),
                                               mutable_data<float>(d_weight),
                                               mutable_data<float>(d_bias),
                                               mutable_data<float>(partial),
                                               rows_per_sample};
        run_layer_norm_backward(args, rows, width, launcher);
    });
}

}  // namespace vitfast::cuda
