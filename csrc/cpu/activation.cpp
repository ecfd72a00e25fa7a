#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "reduce.h"

// Shapes: T rows, F hidden width.
namespace vitfast {

template <class Y>
struct ActivationBackward {
    const Y *h, *d_act;
    Y *d_h, *act;  // act: null, or the recomputed activation
    int64_t width;
};

}  // namespace vitfast

#define VITFAST_KERNEL "activation_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

bool is_tanh(const std::string& kind) {
    if (kind != "gelu" && kind != "gelu_tanh") fail("kind is \"", kind, "\"; allowed: \"gelu\", \"gelu_tanh\"");
    return kind == "gelu_tanh";
}

template <class Run>
void with_dtype(const Tensor& h, const Run& run) {
    check("h", h, Device::kCpu, {ScalarType::Float, ScalarType::BFloat16}, {-1, -1});
    if (h.scalar_type() == ScalarType::Float) {
        run(float{});
    } else {
        run(bf16{});
    }
}

// out[T, F] = act(h[T, F])
void activation_forward(Tensor h, std::string kind, Tensor out) {
    const bool tanh = is_tanh(kind);
    with_dtype(h, [&](auto type) {
        using Y = decltype(type);
        check("out", out, Device::kCpu, {h.scalar_type()}, {h.size(0), h.size(1)});
        const Y* from = data<Y>(h);
        Y* to = mutable_data<Y>(out);
        torch::stable::parallel_for(0, h.numel(), 8192, [&](int64_t begin, int64_t end) {
            VITFAST_DISPATCH(activation_forward_any(tanh, from, to, begin, end));
        });
    });
}

// d_h = d_act * act'(h); optionally the activation again, and d_bias[F], the column sums of d_h before rounding.
void activation_backward(Tensor h, Tensor d_act, std::string kind, Tensor d_h, OptionalTensor act,
                         OptionalTensor d_bias) {
    const bool tanh = is_tanh(kind);
    with_dtype(h, [&](auto type) {
        using Y = decltype(type);
        const int64_t rows = h.size(0), width = h.size(1);
        check("d_act", d_act, Device::kCpu, {h.scalar_type()}, {rows, width});
        check("d_h", d_h, Device::kCpu, {h.scalar_type()}, {rows, width});
        check("act", act, Device::kCpu, {h.scalar_type()}, {rows, width});
        check("d_bias", d_bias, Device::kCpu, {ScalarType::Float}, {width});
        const ActivationBackward<Y> args{data<Y>(h), data<Y>(d_act), mutable_data<Y>(d_h), mutable_data<Y>(act), width};
        ColumnSums sums(rows, d_bias.has_value() ? width : 0);
        sums.accumulate([&](int64_t begin, int64_t end, float* partial) {
            float* const bias_sums = d_bias.has_value() ? partial : nullptr;
            VITFAST_DISPATCH(activation_backward_any(tanh, args, begin, end, bias_sums));
        });
        if (d_bias.has_value()) sums.finish(mutable_data<float>(d_bias), 0, width);
    });
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("activation_forward", TORCH_BOX(&vitfast::activation_forward));
    m.impl("activation_backward", TORCH_BOX(&vitfast::activation_backward));
}
