// The arithmetic of LayerNorm (Ba et al. 2016, arXiv:1607.06450), one element at a time, in fp32. fmaf is written out
// wherever a product feeds a sum, so that every kernel that calls a function here rounds alike: layer_norm_apply must
// reproduce layer_norm_forward bit for bit.
#pragma once

#include <cmath>

#include "host_device.h"

namespace vitfast::cuda {

// x + factor * branch, factor = drop_path[sample] * scale[column].
VITFAST_HOST_DEVICE float residual_sum(float x, float branch, float factor) { return fmaf(factor, branch, x); }

VITFAST_HOST_DEVICE float reciprocal_std(float sum_of_squares, int64_t width, float eps) {
    return 1.0f / sqrtf(sum_of_squares / static_cast<float>(width) + eps);
}

VITFAST_HOST_DEVICE float standardize(float x, float mean, float rstd) { return (x - mean) * rstd; }

VITFAST_HOST_DEVICE float normalize(float x, float mean, float rstd, float weight, float bias) {
    return fmaf(standardize(x, mean, rstd), weight, bias);
}

// d_total + rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = d_normed * weight and the means over the row.
VITFAST_HOST_DEVICE float input_grad(float g, float x_hat, float mean_g, float mean_g_x_hat, float rstd,
                                     float d_total) {
    return fmaf(rstd, fmaf(-x_hat, mean_g_x_hat, g - mean_g), d_total);
}

}  // namespace vitfast::cuda
