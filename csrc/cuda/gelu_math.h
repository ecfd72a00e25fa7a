// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) and its derivative, in fp32: x * Phi(x), and the tanh
// approximation of section 2. fmaf is written out so that forward and backward recompute the same bits.
#pragma once

#include <cmath>

#include "host_device.h"

namespace vitfast::cuda {

enum class Gelu { kErf, kTanh };

constexpr float kInvSqrt2 = 0.70710678118654752f;
constexpr float kInvSqrt2Pi = 0.39894228040143268f;
constexpr float kSqrt2OverPi = 0.79788456080286536f;
constexpr float kTanhCubic = 0.044715f;

struct GeluResult {
    float value;
    float derivative;
};

VITFAST_HOST_DEVICE float gelu_tanh_inner(float x) { return kSqrt2OverPi * x * fmaf(kTanhCubic * x, x, 1.0f); }

template <Gelu KIND>
VITFAST_HOST_DEVICE float gelu(float x) {
    const float half = 0.5f * x;
    if constexpr (KIND == Gelu::kErf) {
        return fmaf(half, erff(x * kInvSqrt2), half);
    } else {
        return fmaf(half, tanhf(gelu_tanh_inner(x)), half);
    }
}

template <Gelu KIND>
VITFAST_HOST_DEVICE GeluResult gelu_with_derivative(float x) {
    const float half = 0.5f * x;
    if constexpr (KIND == Gelu::kErf) {
        const float erf_x = erff(x * kInvSqrt2);
        const float density = kInvSqrt2Pi * expf(-0.5f * x * x);
        return {fmaf(half, erf_x, half), fmaf(x, density, fmaf(0.5f, erf_x, 0.5f))};
    } else {
        const float t = tanhf(gelu_tanh_inner(x));
        const float inner_slope = kSqrt2OverPi * fmaf(3.0f * kTanhCubic * x, x, 1.0f);
        return {fmaf(half, t, half), fmaf(half * fmaf(-t, t, 1.0f), inner_slope, fmaf(0.5f, t, 0.5f))};
    }
}

}  // namespace vitfast::cuda
