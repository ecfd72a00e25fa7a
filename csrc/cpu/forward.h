#pragma once

#include "check.h"
#include "linear.h"

// The raw forward kernels of this folder, for each other. Shapes are documented beside each implementation.
namespace vitfast {

void layer_norm_forward(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor weight,
                        Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean, Tensor rstd,
                        bf16* in_tiles = nullptr);
void linear(Tensor x, Tensor weight, bool transposed, OptionalTensor packed, OptionalTensor bias,
            std::string activation, OptionalTensor residual, OptionalTensor scale, OptionalTensor drop_path,
            OptionalTensor before, Tensor out, TileRows in_tiles = {});
void int8_linear(Tensor x, OptionalTensor norm_weight, OptionalTensor norm_bias, double eps, Tensor packed,
                 Tensor start, Tensor weight_scale, OptionalTensor bias, std::string activation,
                 OptionalTensor residual, OptionalTensor scale, Tensor out);
void activation_forward(Tensor h, std::string name, Tensor out);
void attention_forward(Tensor qkv, double scale, OptionalTensor bias, OptionalTensor padding, OptionalTensor cos,
                       OptionalTensor sin, bool interleaved, std::string q_norm, std::string k_norm,
                       OptionalTensor q_weight, OptionalTensor q_bias, OptionalTensor k_weight, OptionalTensor k_bias,
                       double q_eps, double k_eps, Tensor cu_seqlens, int64_t max_seqlen, Tensor out, Tensor lse,
                       bool in_tiles = false);

}  // namespace vitfast
