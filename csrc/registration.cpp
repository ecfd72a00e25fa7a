#include <torch/csrc/stable/library.h>

#include "python_module.h"

// The raw kernels' schemas, for every device. Outputs are allocated by the caller and passed in as Tensor(a!);
// vitfast/ops wraps these into the public operators. Shapes are documented beside each implementation.
#define VITFAST_HEADS                                                                                        \
    "Tensor? cos, Tensor? sin, bool interleaved, str q_norm, str k_norm, Tensor? q_weight, Tensor? q_bias, " \
    "Tensor? k_weight, Tensor? k_bias, float q_eps, float k_eps"

STABLE_TORCH_LIBRARY(vitfast_C, m) {
    m.def(
        "layer_norm_forward(Tensor x, Tensor? branch, Tensor? scale, Tensor? drop_path, Tensor weight, Tensor bias, "
        "float eps, Tensor(a!)? total, Tensor(b!) normed, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
    m.def(
        "layer_norm_apply(Tensor total, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor(a!) normed) -> "
        "()");
    m.def(
        "layer_norm_backward(Tensor d_normed, Tensor? d_total, Tensor total, Tensor mean, Tensor rstd, Tensor weight, "
        "Tensor? branch, Tensor? scale, Tensor? drop_path, Tensor(a!) d_x, Tensor(b!)? d_branch, Tensor(c!)? d_scale, "
        "Tensor(d!) d_weight, Tensor(e!) d_bias) -> ()");
    m.def(
        "scale_add_forward(Tensor residual, Tensor branch, Tensor? scale, Tensor? drop_path, Tensor(a!) total) -> ()");
    m.def("activation_forward(Tensor h, str kind, Tensor(a!) out) -> ()");
    m.def(
        "activation_backward(Tensor h, Tensor d_act, str kind, Tensor(a!) d_h, Tensor(b!)? act, Tensor(c!)? d_bias) -> "
        "()");
    m.def("attention_forward(Tensor qkv, float scale, Tensor? bias, Tensor? padding, " VITFAST_HEADS
          ", Tensor cu_seqlens, int max_seqlen, Tensor(a!) out, Tensor(b!) lse) -> ()");
    m.def(
        "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor? bias, Tensor? "
        "padding, " VITFAST_HEADS
        ", Tensor cu_seqlens, int max_seqlen, Tensor(a!) d_qkv, Tensor(b!)? d_bias, Tensor(c!)? d_q_norm, "
        "Tensor(d!)? d_k_norm) -> ()");
    m.def("patchify(Tensor images, int patch, Tensor scale, Tensor shift, Tensor(a!) patches) -> ()");
    m.def("unpatchify(Tensor d_patches, int patch, Tensor scale, Tensor(a!) d_images) -> ()");
    m.def(
        "assemble_tokens(Tensor projected, Tensor? bias, Tensor? pos_embed, Tensor? prefix, Tensor(a!) tokens) -> ()");
    m.def(
        "linear(Tensor x, Tensor weight, bool transposed, Tensor? packed, Tensor? bias, str activation, "
        "Tensor? residual, Tensor? scale, Tensor? drop_path, Tensor(a!)? before, Tensor(b!) out) -> ()");
    m.def("pack_linear_weight(Tensor weight) -> Tensor");
    m.def(
        "int8_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor packed, Tensor start, "
        "Tensor weight_scale, Tensor? bias, str activation, Tensor? residual, Tensor? scale, Tensor(a!) out) -> ()");
    m.def("linear_weight_grad(Tensor d_out, Tensor x, Tensor(a!) d_weight) -> ()");
    m.def(
        "norm_attention_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor qkv_weight, "
        "Tensor? qkv_packed, Tensor? qkv_bias, int heads, float scale, Tensor cu_seqlens, int max_seqlen, "
        "Tensor proj_weight, Tensor? proj_packed, Tensor? proj_bias, Tensor? proj_scale, Tensor(a!) out) -> ()");
    m.def(
        "norm_mlp_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, "
        "Tensor? fc1_packed, Tensor? fc1_bias, str activation, Tensor fc2_weight, Tensor? fc2_packed, "
        "Tensor? fc2_bias, Tensor? scale, Tensor(a!) out) -> ()");
    m.def(
        "blocks_forward(Tensor x, Tensor[] parameters, int heads, float scale, float eps, str activation, "
        "Tensor? cos, Tensor? sin, bool interleaved, Tensor cu_seqlens, int max_seqlen, bool first_token, Tensor(a!) "
        "out) -> ()");
    m.def(
        "int8_blocks_forward(Tensor x, Tensor[] parameters, int heads, float scale, float eps, str activation, "
        "Tensor? cos, Tensor? sin, bool interleaved, Tensor cu_seqlens, int max_seqlen, bool first_token, "
        "Tensor(a!) out) -> ()");
    m.def("multiply_add_rate(str dtype, float seconds) -> float");
    m.def("cpu_capability() -> str");
    m.def("set_cpu_capability(str capability) -> ()");
}

VITFAST_PYTHON_MODULE(_C)
