// Activations and their gradients over h[T, F], or [T, 2F] with a gate (see activation.cpp). Included by
// for_each_isa.h.
#include "vec_math.h"

template <class Activation, class Y>
void activation_forward_span(const Y* h, Y* out, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) store(out + i, Activation::value(load(h + i, end - i)), end - i);
}

template <class Activation, class Y>
void activation_backward_rows(const ActivationBackward<Y>& a, int64_t begin, int64_t end, float* d_bias) {
    for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * a.width;
        for (int64_t f = 0; f < a.width; f += kLanes) {
            const int64_t n = a.width - f;
            Vec value, slope;
            Activation::value_and_slope(load(a.h + row + f, n), &value, &slope);
            const Vec d_h = load(a.d_act + row + f, n) * slope;
            store(a.d_h + row + f, d_h, n);
            if (a.act) store(a.act + row + f, value, n);
            if (d_bias) store(d_bias + f, load(d_bias + f, n) + d_h, n);
        }
    }
}

template <class Y>
constexpr bool kFast = std::is_same_v<Y, bf16>;

template <class Y>
void activation_forward_any(Kind kind, const Y* h, Y* out, int64_t begin, int64_t end) {
    if (kind == Kind::kGeluTanh) return activation_forward_span<GeluTanh<kFast<Y>>>(h, out, begin, end);
    if (kind == Kind::kQuickGelu) return activation_forward_span<Silu<true, kFast<Y>>>(h, out, begin, end);
    activation_forward_span<Gelu<kFast<Y>>>(h, out, begin, end);
}

// out = silu(gate) * up; a row of h is [gate | up], each `width` long.
template <class Y>
void swiglu_forward_rows(const Y* h, Y* out, int64_t width, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const Y *gate = h + 2 * t * width, *up = gate + width;
        for (int64_t f = 0; f < width; f += kLanes) {
            const int64_t n = width - f;
            store(out + t * width + f, Silu<false, kFast<Y>>::value(load(gate + f, n)) * load(up + f, n), n);
        }
    }
}

template <class Y>
void swiglu_backward_rows(const ActivationBackward<Y>& a, int64_t begin, int64_t end, float* d_bias) {
    for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * a.width, gates = 2 * row, ups = gates + a.width;
        for (int64_t f = 0; f < a.width; f += kLanes) {
            const int64_t n = a.width - f;
            Vec value, slope;
            Silu<false, kFast<Y>>::value_and_slope(load(a.h + gates + f, n), &value, &slope);
            const Vec up = load(a.h + ups + f, n), d_act = load(a.d_act + row + f, n);
            const Vec d_gate = d_act * up * slope, d_up = d_act * value;
            store(a.d_h + gates + f, d_gate, n);
            store(a.d_h + ups + f, d_up, n);
            if (a.act) store(a.act + row + f, value * up, n);
            if (d_bias) {
                store(d_bias + f, load(d_bias + f, n) + d_gate, n);
                store(d_bias + a.width + f, load(d_bias + a.width + f, n) + d_up, n);
            }
        }
    }
}

template <class Y>
void activation_backward_any(Kind kind, const ActivationBackward<Y>& a, int64_t begin, int64_t end, float* d_bias) {
    switch (kind) {
        case Kind::kSwiGlu:
            return swiglu_backward_rows(a, begin, end, d_bias);
        case Kind::kGeluTanh:
            return activation_backward_rows<GeluTanh<kFast<Y>>>(a, begin, end, d_bias);
        case Kind::kQuickGelu:
            return activation_backward_rows<Silu<true, kFast<Y>>>(a, begin, end, d_bias);
        case Kind::kGelu:
            return activation_backward_rows<Gelu<kFast<Y>>>(a, begin, end, d_bias);
    }
}
