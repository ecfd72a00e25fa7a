// GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415) and its derivative, in fp32: x * Phi(x), the tanh approximation of
// section 2 as x * sigmoid(2u), CLIP's x * sigmoid(1.702 x), and SwiGLU's x * sigmoid(x) (Shazeer 2020,
// arXiv:2002.05202). fmaf is written out so that forward and backward recompute the same bits.
//
// At 4 bytes an element an H200 has about 27 instruction slots per element, which erff alone nearly fills. FAST, for
// 16-bit outputs, uses the hardware's exp2 and reciprocal (errors near 2^-22) and for Phi formula 7.1.26 of Abramowitz
// and Stegun (error 1.5e-7), whose exponential the derivative shares; a bf16 rounds off 4e-3, an fp16 5e-4.
#pragma once

#include <cmath>

#include "host_device.h"

namespace vitfast::cuda {

// kSwiGlu is silu(gate) * up; the functions here give its silu.
enum class Activation { kGelu, kGeluTanh, kQuickGelu, kSwiGlu };

struct ActivationResult {
    float value;
    float derivative;
};

template <bool FAST>
VITFAST_HOST_DEVICE float exponential(float x) {
#ifdef __CUDA_ARCH__
    if constexpr (FAST) {
        float result;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
        return result;
    }
#endif
    return expf(x);
}

// x >= 1
template <bool FAST>
VITFAST_HOST_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
    if constexpr (FAST) {
        float result;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
        return result;
    }
#endif
    return 1.0f / x;
}

// Never fused with the last product inside expf.
VITFAST_HOST_DEVICE float one_plus(float x) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(1.0f, x);
#else
    return 1.0f + x;
#endif
}

template <Activation KIND, bool FAST>
VITFAST_HOST_DEVICE ActivationResult activate_with_derivative(float x) {
    if constexpr (KIND == Activation::kGelu) {
        constexpr float kInvSqrt2 = 0.70710678118654752f;
        constexpr float kInvSqrt2Pi = 0.39894228040143268f;
        const float exp_x = exponential<FAST>(-0.5f * x * x);
        float phi;
        if constexpr (FAST) {
            const float t = reciprocal<FAST>(fmaf(0.3275911f * kInvSqrt2, fabsf(x), 1.0f));
            float series = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
            series = fmaf(t, series, 0.5f * 1.421413741f);
            series = fmaf(t, series, 0.5f * -0.284496736f);
            series = fmaf(t, series, 0.5f * 0.254829592f);
            series *= t;
            phi = x < 0.0f ? series * exp_x : fmaf(-series, exp_x, 1.0f);
        } else {
            phi = fmaf(0.5f, erff(x * kInvSqrt2), 0.5f);
        }
        return {x * phi, fmaf(x, kInvSqrt2Pi * exp_x, phi)};
    } else if constexpr (KIND == Activation::kGeluTanh) {
        constexpr float kTwoSqrt2OverPi = 1.5957691216057308f;
        constexpr float kCubic = 0.044715f;
        const float square = x * x;
        const float two_u = kTwoSqrt2OverPi * x * fmaf(kCubic, square, 1.0f);
        const float two_u_slope = kTwoSqrt2OverPi * fmaf(3.0f * kCubic, square, 1.0f);
        const float sigmoid = reciprocal<FAST>(one_plus(exponential<FAST>(-two_u)));
        const float value = x * sigmoid;
        return {value, fmaf(value * (1.0f - sigmoid), two_u_slope, sigmoid)};
    } else {
        constexpr float kFactor = KIND == Activation::kQuickGelu ? 1.702f : 1.0f;
        const float sigmoid = reciprocal<FAST>(one_plus(exponential<FAST>(-kFactor * x)));
        const float value = x * sigmoid;
        return {value, fmaf(value * (1.0f - sigmoid), kFactor, sigmoid)};
    }
}

// The derivative's instructions fall away where only the value is used.
template <Activation KIND, bool FAST>
VITFAST_HOST_DEVICE float activate(float x) {
    return activate_with_derivative<KIND, FAST>(x).value;
}

}  // namespace vitfast::cuda
