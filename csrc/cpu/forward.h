#pragma once

#include "check.h"

// The raw forward kernels of this folder, for each other. Shapes are documented beside each implementation.
namespace vitfast {

void layer_norm_forward(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor weight,
                        Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean, Tensor rstd);
void linear(Tensor x, Tensor weight, bool transposed, OptionalTensor bias, std::string activation,
            OptionalTensor residual, OptionalTensor scale, OptionalTensor drop_path, OptionalTensor before, Tensor out);
void activation_forward(Tensor h, std::string name, Tensor out);
void attention_forward(Tensor qkv, double scale, OptionalTensor bias, OptionalTensor padding, Tensor cu_seqlens,
                       int64_t max_seqlen, Tensor out, Tensor lse);

}  // namespace vitfast
