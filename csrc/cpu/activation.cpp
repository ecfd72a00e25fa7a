#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "forward.h"
#include "reduce.h"

// Shapes: T rows, F hidden width, H = F, or 2F for "swiglu": the gate's columns, then those it multiplies.
namespace vitfast {

enum class Kind { kGelu, kGeluTanh, kQuickGelu, kSwiGlu };

template <class Y>
struct ActivationBackward {
    const Y *h, *d_act;
    Y *d_h, *act;   // act: null, or the recomputed activation
    int64_t width;  // F
};

}  // namespace vitfast

#define VITFAST_KERNEL "activation_kernel.h"
#include "for_each_isa.h"

namespace vitfast {
namespace {

Kind kind_of(const std::string& kind) {
    if (kind == "gelu") return Kind::kGelu;
    if (kind == "gelu_tanh") return Kind::kGeluTanh;
    if (kind == "quick_gelu") return Kind::kQuickGelu;
    if (kind == "swiglu") return Kind::kSwiGlu;
    fail("kind is \"", kind, "\"; allowed: \"gelu\", \"gelu_tanh\", \"quick_gelu\", \"swiglu\"");
}

// F for h[T, H].
int64_t activated_width(Kind kind, const Tensor& h) {
    if (kind != Kind::kSwiGlu) return h.size(1);
    if (h.size(1) % 2 != 0) fail("h has ", h.size(1), " columns; swiglu needs an even number, gate and up");
    return h.size(1) / 2;
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

}  // namespace

// out[T, F] = act(h[T, H])
void activation_forward(Tensor h, std::string name, Tensor out) {
    constexpr int64_t kElements = 8192;  // the least that is worth another thread
    const Kind kind = kind_of(name);
    with_dtype(h, [&](auto type) {
        using Y = decltype(type);
        const int64_t width = activated_width(kind, h);
        check("out", out, Device::kCpu, {h.scalar_type()}, {h.size(0), width});
        const Y* from = data<Y>(h);
        Y* to = mutable_data<Y>(out);
        if (kind == Kind::kSwiGlu) {
            const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(width, 1));
            torch::stable::parallel_for(0, h.size(0), rows, [&](int64_t begin, int64_t end) {
                VITFAST_DISPATCH(swiglu_forward_rows(from, to, width, begin, end));
            });
            return;
        }
        torch::stable::parallel_for(0, h.numel(), kElements, [&](int64_t begin, int64_t end) {
            VITFAST_DISPATCH(activation_forward_any(kind, from, to, begin, end));
        });
    });
}

namespace {

// d_h[T, H] from d_act[T, F]; optionally act[T, F] again, and d_bias[H], the column sums of d_h before rounding.
void activation_backward(Tensor h, Tensor d_act, std::string name, Tensor d_h, OptionalTensor act,
                         OptionalTensor d_bias) {
    const Kind kind = kind_of(name);
    with_dtype(h, [&](auto type) {
        using Y = decltype(type);
        const int64_t rows = h.size(0), columns = h.size(1), width = activated_width(kind, h);
        check("d_act", d_act, Device::kCpu, {h.scalar_type()}, {rows, width});
        check("d_h", d_h, Device::kCpu, {h.scalar_type()}, {rows, columns});
        check("act", act, Device::kCpu, {h.scalar_type()}, {rows, width});
        check("d_bias", d_bias, Device::kCpu, {ScalarType::Float}, {columns});
        const ActivationBackward<Y> args{data<Y>(h), data<Y>(d_act), mutable_data<Y>(d_h), mutable_data<Y>(act), width};
        ColumnSums sums(rows, d_bias.has_value() ? columns : 0);
        sums.accumulate([&](int64_t begin, int64_t end, float* partial) {
            float* const bias_sums = d_bias.has_value() ? partial : nullptr;
            VITFAST_DISPATCH(activation_backward_any(kind, args, begin, end, bias_sums));
        });
        if (d_bias.has_value()) sums.finish(mutable_data<float>(d_bias), 0, columns);
    });
}

}  // namespace
}  // namespace vitfast

STABLE_TORCH_LIBRARY_IMPL(vitfast_C, CPU, m) {
    m.impl("activation_forward", TORCH_BOX(&vitfast::activation_forward));
    m.impl("activation_backward", TORCH_BOX(&vitfast::activation_backward));
}
