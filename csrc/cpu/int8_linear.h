#pragma once

#include "linear.h"

namespace vitfast {

// out = act(row_scale * weight_scale * (q - 128) w^T + bias), or residual + scale * that.
template <class Y>
struct Int8Product {
    using Number = uint8_t;
    using Sum = int32_t;
    const uint8_t* q;
    int64_t pitch, rows, inputs, outputs;  // pitch: bytes of a row of q, whole words
    const uint32_t* packed;
    const int32_t* start;  // added to the sums: -128 * the sum of the weight's row
    const float *row_scale, *weight_scale;
    Parameter bias, scale;
    Finish finish;
    const Y* residual;
    Y* out;
};

}  // namespace vitfast
