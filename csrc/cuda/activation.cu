// Operators on the kernels of activation.cuh; bytes moved and floors are there.
#include <torch/csrc/stable/ops.h>

#include "activation.cuh"
#include "launch.h"
#include "operators.h"

namespace vitfast::cuda {

namespace {

// Calls run with std::integral_constant<Activation, kind>.
template <typename Run>
void with_kind(const std::string& kind, const Run& run) {
    if (kind == "gelu") return run(std::integral_constant<Activation, Activation::kGelu>{});
    if (kind == "gelu_tanh") return run(std::integral_constant<Activation, Activation::kGeluTanh>{});
    if (kind == "quick_gelu") return run(std::integral_constant<Activation, Activation::kQuickGelu>{});
    if (kind == "swiglu") return run(std::integral_constant<Activation, Activation::kSwiGlu>{});
    fail("kind is '", kind, "'; allowed: 'gelu', 'gelu_tanh', 'quick_gelu', 'swiglu'");
}

// F for h[T, H].
int activated_width(Activation kind, const Tensor& h) {
    if (h.size(1) % halves_of(kind) != 0) fail("h has ", h.size(1), " columns; swiglu needs an even number");
    return checked_width("h", h.size(1), kMostColumns) / halves_of(kind);
}

}  // namespace

void activation_forward(Tensor h, std::string kind, Tensor out) {
    with_dtype("h", h, [&](auto y_type) {
        using Y = decltype(y_type);
        const Arguments arguments("h", h);
        arguments.check("h", h, {h.scalar_type()}, {-1, -1});
        with_kind(kind, [&](auto activation) {
            const int width = activated_width(activation.value, h);
            arguments.check("out", out, {h.scalar_type()}, {h.size(0), width});
            Launcher launcher(h);
            run_activation_forward<Y, activation.value>(data<Y>(h), mutable_data<Y>(out), h.size(0), width, launcher);
        });
    });
}

void activation_backward(Tensor h, Tensor d_act, std::string kind, Tensor d_h, OptionalTensor act,
                         OptionalTensor d_bias) {
    with_dtype("h", h, [&](auto y_type) {
        using Y = decltype(y_type);
        const Arguments arguments("h", h);
        arguments.check("h", h, {h.scalar_type()}, {-1, -1});
        const int64_t rows = h.size(0), columns = h.size(1);
        with_kind(kind, [&](auto activation) {
            const int width = activated_width(activation.value, h);
            arguments.check("d_act", d_act, {h.scalar_type()}, {rows, width});
            arguments.check("d_h", d_h, {h.scalar_type()}, {rows, columns});
            arguments.check("act", act, {h.scalar_type()}, {rows, width});
            arguments.check("d_bias", d_bias, {ScalarType::Float}, {columns});
            if (width == 0) return;
            Launcher launcher(h);
            OptionalTensor partial;
            if (d_bias.has_value()) {
                partial = torch::stable::new_empty(
                    *d_bias, {activation_workspace_size<Y>(activation.value, rows, width, launcher.multiprocessors())});
            }
            const ActivationBackwardArgs<Y> args{data<Y>(h),
                                                 data<Y>(d_act),
                                                 mutable_data<Y>(d_h),
                                                 mutable_data<Y>(act),
                                                 mutable_data<float>(d_bias),
                                                 mutable_data<float>(partial),
                                                 rows,
                                                 width};
            run_activation_backward<Y, activation.value>(args, launcher);
        });
    });
}

}  // namespace vitfast::cuda
