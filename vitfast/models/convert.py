"""Other people's Vision Transformer weights into ours: timm, torchvision, Hugging Face and Google's .npz files.

Our parameter names are timm's. C channels, P patch, D width, H heads, E head dim, R prefix tokens, N patches.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitfast.layers.resample import resample_pos_embed
from vitfast.models.vit import VisionTransformer

_TORCHVISION = (
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

_GOOGLE = (
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

_HUGGING_FACE = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),  # before transformers 5, and from 5 on
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1/"),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1/"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Loads a weight file into ``model``, strictly, and returns the model.

    path: ``.safetensors`` or a PyTorch file (read with ``weights_only=True``) with timm's, torchvision's or Hugging
    Face ViT's names, bare or under "state_dict" or "model"; or Google's ``.npz``. Position embeddings of another image
    size are resampled (bicubic with antialiasing; bilinear for .npz, as published).
    Raises ValueError for a file that cannot be read safely or does not fit the model, FileNotFoundError.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return load_state_dict(model, from_google(read_npz(path)), interpolation="bilinear", antialias=False)
    state_dict = read_state_dict(path)
    if "encoder.pos_embedding" in state_dict:
        state_dict = from_torchvision(state_dict)
    elif any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state_dict):
        state_dict = from_hugging_face(state_dict)
    return load_state_dict(model, state_dict)


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> nn.Module:
    """Loads a state dict with our (timm's) names strictly and returns the model; resamples position embeddings.

    Raises ValueError with the first few keys that are missing, unexpected or of another shape; the model is then
    unchanged.
    """
    wanted = model.state_dict()
    given = dict(state_dict)
    ours, theirs = getattr(model, "pos_embed", None), given.get("pos_embed")
    if (
        isinstance(model, VisionTransformer)
        and ours is not None
        and theirs is not None
        and _needs_resampling(ours, theirs)
    ):
        given["pos_embed"] = resample_pos_embed(
            theirs,
            model.patch_embed.grid_size,
            num_prefix_tokens=ours.shape[1] - model.patch_embed.num_patches,
            interpolation=interpolation,
            antialias=antialias,
        )
    problems = [
        _first_few("missing", [key for key in wanted if key not in given]),
        _first_few("unexpected", [key for key in given if key not in wanted]),
        _first_few(
            "of another shape",
            [
                f"{key} (file {tuple(given[key].shape)}, model {tuple(wanted[key].shape)})"
                for key in wanted
                if key in given and given[key].shape != wanted[key].shape
            ],
        ),
    ]
    if any(problems):
        raise ValueError(f"the state dict does not fit {type(model).__name__}: {'; '.join(filter(None, problems))}")
    model.load_state_dict(given, strict=True)
    return model


def _needs_resampling(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    same_width = theirs.ndim == 3 and theirs.shape[-1] == ours.shape[-1]
    return same_width and theirs.shape[1] != ours.shape[1]


def from_torchvision(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's ``vit_*`` state dict with our names."""
    return {_rename(key, _TORCHVISION): tensor for key, tensor in state_dict.items()}


def from_hugging_face(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' ViTForImageClassification (or ViTModel without pooler) state dict with our names.

    Its LayerNorm eps is 1e-12: create the model with ``norm_eps=1e-12`` for the same numbers.
    """
    return _join_heads({_rename(key, _HUGGING_FACE): tensor for key, tensor in state_dict.items()})


def from_google(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The arrays of Google's ViT, AugReg or big_vision ``.npz`` (names as in the file) with our names and layout.

    A file with a tanh layer ("pre_logits") needs a model with ``representation_size``.
    """
    renamed = {}
    for key, array in arrays.items():
        key = re.sub(r"^(?:opt/target/|params/(?:img/)?)", "", key)
        renamed[_rename(key, _GOOGLE)] = _from_flax(key, torch.from_numpy(array))
    return _join_heads(renamed)


def _from_flax(key: str, tensor: torch.Tensor) -> torch.Tensor:
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


def _join_heads(named: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Joins ".q/", ".k/" and ".v/" into ".qkv.", in the attention pool ".k/" and ".v/" into ".kv."."""
    joined = {}
    for key, tensor in named.items():
        match = re.fullmatch(r"(.*)\.[qkv]/(weight|bias)", key)
        stem, kind = match.groups() if match else ("", "")
        letters = "kv" if stem == "attn_pool" else "qkv"
        parts = [f"{stem}.{letter}/{kind}" for letter in letters]
        if match and all(part in named for part in parts):
            joined[f"{stem}.{letters}.{kind}"] = torch.cat([named[part] for part in parts])
        else:
            joined[key] = tensor
    return joined


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` or PyTorch file on the CPU, unwrapped from "state_dict" or "model".

    Never runs code from the file. Raises ValueError when it cannot be read that way, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt archives and refused pickles raise many kinds
        raise ValueError(f"{path} cannot be read as weights (only tensors are accepted): {error}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: a mapping from names to tensors, bare or under 'state_dict'")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in content.items()}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file; raises ValueError when it is not one, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an .npz file of arrays: {error}") from error


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _first_few(what: str, keys: list[str], limit: int = 5) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return f"{len(keys)} {what}: {', '.join(keys[:limit])}{more}"
