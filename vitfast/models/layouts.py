"""Other people's parameter names and layouts into ours, which are timm's.

What is the same under another name is renamed here, without a model; what depends on the model is in ``adapt``.
C channels, P patch, D width, H heads, E head dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_TORCHVISION: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
    (r"^heads\.pre_logits\.", "pre_logits.fc."),
)

_GOOGLE: Rules = (
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"^MAPHead_0/LayerNorm_0/", "attn_pool.norm."),
    (r"^MAPHead_0/probe$", "attn_pool.latent"),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/out/", "attn_pool.proj."),
    (r"^MAPHead_0/MultiHeadDotProductAttention_0/query/", "attn_pool.q."),
    (r"^MAPHead_0/(?:MultiHeadDotProductAttention_0/)?", "attn_pool."),
    (r"LayerNorm_0/", "norm1."),
    (r"LayerNorm_[12]/", "norm2."),  # 1 in big_vision, 2 in the paper's own code
    (r"MultiHeadDotProductAttention_[01]/out/", "attn.proj."),
    (r"MultiHeadDotProductAttention_[01]/", "attn."),
    (r"\.([qkv])(?:uery|ey|alue)/", r".\1/"),  # _join_heads puts these together
    (r"MlpBlock_[03]/Dense_0/", "mlp.fc1."),
    (r"MlpBlock_[03]/Dense_1/", "mlp.fc2."),
    (r"^Transformer/encoder_norm/", "norm."),
    (r"^(?:Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed.proj."),
    (r"^head/", "head."),
    (r"^pre_logits/", "pre_logits.fc."),
    (r"(?:scale|kernel)$", "weight"),
)

# transformers: ViT, DeiT, ViTMAE, DINOv2 (with registers), DINOv3-ViT, SigLIP (2) and CLIP vision towers; names before
# and since its version 5
_HUGGING_FACE: Rules = (
    (r"^(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|vision_model)\.", ""),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embedding(?:s|\.weight)$", "pos_embed"),
    (r"^embeddings\.patch_embedding(?:s\.projection|s|)\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:model\.)?(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1/"),
    (r"\.(?:attention|self_attn)\.([qkv])_proj\.", r".attn.\1/"),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^visual_projection\.", "head."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
)
_HUGGING_FACE_OTHERS = re.compile(
    r"^(?:text_model|text_projection|logit_|decoder)|^(?:\w+\.)?pooler\.|(?:^|\.)position_ids$"
)

# the releases of DINOv2, DINOv3 and EVA themselves, and towers inside OpenCLIP files
_ORIGINAL: Rules = (
    (r"^visual\.trunk\.", ""),
    (r"^(?:storage|register)_tokens$", "reg_token"),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

# parts of training or of tables that are computed, not learned; no model here has a place for them
_NEVER_WEIGHTS = re.compile(
    r"(?:^|\.)(?:mask_token|bias_mask|relative_position_index)$|^rope(?:_embed)?\.(?!freqs$)|\.rope\."
)


def to_our_names(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Any known state dict with our names, found out by its keys; timm's passes through."""
    state_dict = {key: value for key, value in state_dict.items() if not _NEVER_WEIGHTS.search(key)}
    if "encoder.pos_embedding" in state_dict:
        return from_torchvision(state_dict)
    if any(re.search(r"(?:^|\.)embeddings\.patch_embedding", key) for key in state_dict):
        return from_hugging_face(state_dict)
    if any(key.startswith("visual.trunk.") for key in state_dict):  # an OpenCLIP file: its text tower is not for us
        state_dict = {key: value for key, value in state_dict.items() if key.startswith("visual.trunk.")}
    return {_rename(key, _ORIGINAL): value for key, value in state_dict.items()}


def from_torchvision(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ``vit_*`` state dict with our names."""
    return {_rename(key, _TORCHVISION): tensor for key, tensor in state_dict.items()}


def from_hugging_face(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' vision models with our names; text towers, poolers and MAE's decoder are left out.

    The LayerNorm eps of ViT, DeiT and ViTMAE is 1e-12 there: create the model with ``norm_eps=1e-12`` for the same
    numbers. DeiT's distillation token has no place here.
    """
    kept = {key: value for key, value in state_dict.items() if not _HUGGING_FACE_OTHERS.search(key)}
    renamed = {_rename(key, _HUGGING_FACE): value for key, value in kept.items()}
    for key in [key for key in renamed if ".mlp.up_proj." in key]:  # gated or not: the second product, or the only one
        gated = key.replace(".up_proj.", ".fc1_g.") in renamed
        renamed[key.replace(".up_proj.", ".fc1_x." if gated else ".fc1.")] = renamed.pop(key)
    for key, dims in (("cls_token", 3), ("pos_embed", 3)):
        if key in renamed:
            renamed[key] = renamed[key].view((1,) * (dims - renamed[key].ndim) + tuple(renamed[key].shape))
    for kind in ("weight", "bias"):
        joined = renamed.pop(f"attn_pool.in_proj.{kind}", None)
        if joined is not None:
            width = joined.shape[0] // 3
            renamed[f"attn_pool.q.{kind}"], renamed[f"attn_pool.kv.{kind}"] = joined[:width], joined[width:]
    return _join_heads(renamed)


def from_google(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of Google's ViT, AugReg or big_vision ``.npz`` (names as in the file) with our names and layout.

    A file with a tanh layer ("pre_logits") needs a model with ``representation_size``. Raises ValueError for a hybrid.
    """
    named = {re.sub(r"^(?:opt/target/|params/(?:img/)?)", "", key): array for key, array in arrays.items()}
    if "conv_root/kernel" in named:
        raise ValueError(
            "this is a hybrid: a ResNet before the transformer (conv_root, block1, ...), for which there is no model here"
        )
    renamed = {}
    for key, array in _unstacked(named).items():
        renamed[_rename(key, _GOOGLE)] = _from_flax(key, torch.from_numpy(array))
    return _join_heads(renamed)


def _unstacked(named: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters of all layers in one array, as a scanned model of big_vision has them, one by one."""
    single = {}
    for key, array in named.items():
        stem, found, rest = key.partition("Transformer/encoderblock/")
        if found:
            single.update({f"{stem}Transformer/encoderblock_{i}/{rest}": layer for i, layer in enumerate(array)})
        else:
            single[key] = array
    return single


def _from_flax(key: str, tensor: Tensor) -> Tensor:
    """One flax parameter in PyTorch's layout: weights are [out, in], heads are folded into the width."""
    part = key.rsplit("/", 2)
    if key == "embedding/kernel":
        return tensor.permute(3, 2, 0, 1)  # [P, P, C, D] -> [D, C, P, P]
    if part[-1] == "kernel":
        is_output = part[-2] == "out"  # [H, E, D], other attention kernels [D, H, E], dense ones [in, out]
        return (tensor.flatten(0, 1) if is_output else tensor.flatten(1)).T
    if part[-1] == "bias":
        return tensor.flatten()
    return tensor


def _join_heads(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joins ".q/", ".k/" and ".v/" into ".qkv.", in the attention pool ".k/" and ".v/" into ".kv."; a missing bias is 0."""
    joined = {key: tensor for key, tensor in named.items() if not re.search(r"\.[qkv]/(?:weight|bias)$", key)}
    for stem, kind in dict.fromkeys(re.findall(r"^(.*)\.[qkv]/(weight|bias)$", "\n".join(named), flags=re.M)):
        letters = "kv" if stem == "attn_pool" else "qkv"
        parts = [named.get(f"{stem}.{letter}/{kind}") for letter in letters]
        like = next(part for part in parts if part is not None)
        joined[f"{stem}.{letters}.{kind}"] = torch.cat([torch.zeros_like(like) if p is None else p for p in parts])
    return joined


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
