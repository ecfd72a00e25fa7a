// GELU and its gradient over h[T, F]. Included by for_each_isa.h.
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
void activation_forward_any(bool tanh, const Y* h, Y* out, int64_t begin, int64_t end) {
    if (tanh) {
        activation_forward_span<GeluTanh>(h, out, begin, end);
    } else {
        activation_forward_span<Gelu<std::is_same_v<Y, bf16>>>(h, out, begin, end);
    }
}

template <class Y>
void activation_backward_any(bool tanh, const ActivationBackward<Y>& a, int64_t begin, int64_t end, float* d_bias) {
    if (tanh) {
        activation_backward_rows<GeluTanh>(a, begin, end, d_bias);
    } else {
        activation_backward_rows<Gelu<std::is_same_v<Y, bf16>>>(a, begin, end, d_bias);
    }
}
