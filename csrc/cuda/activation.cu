// Operators on the kernels of activation.cuh; bytes moved and floors are there.
#include <torch/csrc/stable/ops.h>

#include "activation.cuh"
#include "launch.h"
#include "operators.h"

namespace vitfast::cuda {

namespace {

// Calls run with std::integral_constant<Gelu, kind>.
template <typename Run>
void with_kind(const std::string& kind, const Run& run) {
    if (kind == "gelu") return run(std::integral_constant<Gelu, Gelu::kErf>{});
    if (kind == "gelu_tanh") return run(std::integral_constant<Gelu, Gelu::kTanh>{});
    fail("kind is '", kind, "'; allowed: 'gelu', 'gelu_tanh'");
}

}  // namespace

void activation_forward(Tensor h, std::string kind, Tensor out) {
    with_dtype("h", h, [&](auto y_type) {
        using Y = decltype(y_type);
        const Arguments arguments("h", h);
        arguments.check("h", h, {h.scalar_type()}, {-1, -1});
        arguments.check("out", out, {h.scalar_type()}, {h.size(0), h.size(1)});
        Launcher launcher(h);
        with_kind(kind, [&](auto gelu) {
            run_activation_forward<Y, gelu.value>(data<Y>(h), mutable_data<Y>(out), h.numel(), launcher);
        });
    });
}

void activation_backward(Tensor h, Tensor d_act, std::string kind, Tensor d_h, OptionalTensor act,
                         OptionalTensor d_bias) {
    with_dtype("h", h, [&](auto y_type) {
        using Y = decltype(y_type);
        const Arguments arguments("h", h);
        arguments.check("h", h, {h.scalar_type()}, {-1, -1});
        const int64_t rows = h.size(0);
        const int width = checked_width("h", h.size(1), kMostColumns);
        arguments.check("d_act", d_act, {h.scalar_type()}, {rows, width});
        arguments.check("d_h", d_h, {h.scalar_type()}, {rows, width});
        arguments.check("act", act, {h.scalar_type()}, {rows, width});
        arguments.check("d_bias", d_bias, {ScalarType::Float}, {width});
        Launcher launcher(h);
        with_kind(kind, [&](auto gelu) {
            if (width == 0) return;
            OptionalTensor partial;
            if (d_bias.has_value()) {
                partial = torch::stable::new_empty(
                    *d_bias, {activation_workspace_size<Y>(rows, width, launcher.multiprocessors())});
            }
            const ActivationBackwardArgs<Y> args{data<Y>(h),
                                                 data<Y>(d_act),
                                                 mutable_data<Y>(d_h),
                                                 mutable_data<Y>(act),
                                                 mutable_data<float>(d_bias),
                                                 mutable_data<float>(partial),
                                                 rows,
                                                 width};
            run_activation_backward<Y, gelu.value>(args, launcher);
        });
    });
}

}  // namespace vitfast::cuda
