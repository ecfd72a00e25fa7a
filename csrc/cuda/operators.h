// The CUDA operators, as csrc/registration.cpp declares their schemas. Shapes and meaning: the .cuh beside each .cu.
#pragma once

#include <string>

#include "check.h"

namespace vitfast::cuda {

void layer_norm_forward(Tensor x, OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor weight,
                        Tensor bias, double eps, OptionalTensor total, Tensor normed, Tensor mean, Tensor rstd);
void layer_norm_apply(Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor normed);
void layer_norm_backward(Tensor d_normed, OptionalTensor d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight,
                         OptionalTensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor d_x,
                         OptionalTensor d_branch, OptionalTensor d_scale, Tensor d_weight, Tensor d_bias);
void scale_add_forward(Tensor residual, Tensor branch, OptionalTensor scale, OptionalTensor drop_path, Tensor total);
void activation_forward(Tensor h, std::string kind, Tensor out);
void activation_backward(Tensor h, Tensor d_act, std::string kind, Tensor d_h, OptionalTensor act,
                         OptionalTensor d_bias);
void patchify(Tensor images, int64_t patch, Tensor scale, Tensor shift, Tensor patches);
void unpatchify(Tensor d_patches, int64_t patch, Tensor scale, Tensor d_images);
void assemble_tokens(Tensor projected, OptionalTensor bias, OptionalTensor pos_embed, OptionalTensor prefix,
                     Tensor tokens);

}  // namespace vitfast::cuda
