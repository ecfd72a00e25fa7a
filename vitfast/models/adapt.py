"""Weights with our names, made to fit one model: its layout, size, channels, tokens and classes.

C channels, P patch, D width, R prefix tokens, N patches, K classes.
"""

from __future__ import annotations

import re
from math import isqrt

import torch
from torch import Tensor

from vitfast.layers.resample import adapt_input_channels, resample_patch_embed, resample_pos_embed
from vitfast.models.vit import VisionTransformer

Weights = dict[str, Tensor]


def adapt(
    model: VisionTransformer,
    weights: Weights,
    *,
    grid: tuple[int, int] | None = None,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> tuple[Weights, list[str]]:
    """The weights as ``model`` takes them, and what was changed, a sentence each. Neither argument is changed.

    grid: rows and columns of patches of the position embeddings; None: square. What cannot be adapted stays as it is,
    for the check of names and shapes to report. Raises ValueError for position embeddings that are no such grid.
    """
    weights, own = dict(weights), model.state_dict()
    notes: list[str] = []
    _rearrange(model, weights, own, notes)
    _patches(weights, own, notes, interpolation, antialias)
    _positions(model, weights, notes, grid, interpolation, antialias)
    _tokens(weights, own, notes)
    _norm_and_pool(model, weights, own, notes)
    _head(weights, own, notes)
    return weights, notes


def _rearrange(model: VisionTransformer, weights: Weights, own: Weights, notes: list[str]) -> None:
    """LayerScale, q, k, v and the gated perceptron in the model's own arrangement; the numbers stay."""
    eva = model.config.block == "eva"
    for key in list(weights):
        renamed = (
            re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", key) if eva else re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key)
        )
        weights[renamed] = weights.pop(key)
    for stem in dict.fromkeys(re.findall(r"^(blocks\.\d+)\.", "\n".join(weights), flags=re.M)):
        _rearrange_qkv(model, weights, own, f"{stem}.attn.", notes)
        _rearrange_gate(weights, own, f"{stem}.mlp.")


def _rearrange_qkv(model: VisionTransformer, weights: Weights, own: Weights, stem: str, notes: list[str]) -> None:
    separate = [f"{stem}{letter}_proj.weight" for letter in "qkv"]
    if f"{stem}qkv.weight" in weights:
        weight = weights.pop(f"{stem}qkv.weight")
    elif all(key in weights for key in separate):
        weight = torch.cat([weights.pop(key) for key in separate])
    else:
        return
    bias = weights.pop(f"{stem}qkv.bias", None)
    if bias is None:
        parts = [weights.pop(f"{stem}{x}_bias", weights.pop(f"{stem}{x}_proj.bias", None)) for x in "qkv"]
        if any(part is not None for part in parts):
            zero = torch.zeros(weight.shape[0] // 3, dtype=weight.dtype)
            bias = torch.cat([zero if part is None else part for part in parts])
    if f"{stem}q_proj.weight" in own:
        weights.update(zip(separate, weight.chunk(3), strict=True))
    else:
        weights[f"{stem}qkv.weight"] = weight
    has_place = any(f"{stem}{name}" in own for name in ("qkv.bias", "q_bias", "q_proj.bias"))
    if bias is None or not (has_place or bias.any()):
        return  # none; where the model has a place for one, the check of names says so
    if f"{stem}qkv.bias" in own:
        weights[f"{stem}qkv.bias"] = bias
        return
    if not has_place:
        weights[f"{stem}qkv.bias"] = bias  # unexpected, and said so
        return
    q, k, v = bias.chunk(3)
    place = "{}_bias" if f"{stem}q_bias" in own else "{}_proj.bias"
    if k.any():
        if model.config.rope_type is not None or model.config.qk_norm:
            weights[f"{stem}qkv.bias"] = bias  # it counts, and the model has no place for it
            return
        notes.append(f"{stem}: the bias of k left out, which softmax does not see")
    weights[stem + place.format("q")], weights[stem + place.format("v")] = q, v


def _rearrange_gate(weights: Weights, own: Weights, stem: str) -> None:
    for kind in ("weight", "bias"):
        packed, gate, value = (f"{stem}{name}.{kind}" for name in ("fc1", "fc1_g", "fc1_x"))
        if packed in weights and gate in own:
            weights[gate], weights[value] = weights.pop(packed).chunk(2)
        elif gate in weights and value in weights and packed in own:
            weights[packed] = torch.cat([weights.pop(gate), weights.pop(value)])


def _patches(weights: Weights, own: Weights, notes: list[str], interpolation: str, antialias: bool) -> None:
    key, bias = "patch_embed.proj.weight", "patch_embed.proj.bias"
    if bias in weights and bias not in own and not weights[bias].any():
        del weights[bias]
    if key not in weights:
        return
    D, C, P, _ = own[key].shape
    weight = weights[key]
    if weight.ndim == 2 and weight.shape[0] == D and weight.shape[1] % (P * P) == 0:
        weight = weight.view(D, -1, P, P)  # a linear layer on flattened patches
    if weight.ndim == 4 and weight.shape[1] != C:
        notes.append(f"patch filters adapted from {weight.shape[1]} to {C} channels")
        weight = adapt_input_channels(weight, C)
    if weight.ndim == 4 and weight.shape[2:] != own[key].shape[2:]:
        notes.append(f"patch filters resampled from {weight.shape[2]} x {weight.shape[3]} to {P} x {P} pixels")
        weight = resample_patch_embed(weight, (P, P), interpolation=interpolation, antialias=antialias)
    weights[key] = weight


def _positions(
    model: VisionTransformer,
    weights: Weights,
    notes: list[str],
    grid: tuple[int, int] | None,
    interpolation: str,
    antialias: bool,
) -> None:
    theirs, ours = weights.get("pos_embed"), model.pos_embed
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[-1] != ours.shape[-1]:
        return
    if grid is None and theirs.shape == ours.shape:
        return
    has_class = "cls_token" in weights
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    prefix = _prefix_rows(theirs.shape[1], int(has_class), registers, grid)
    rows, patches = theirs[:, :prefix], theirs[:, prefix:]
    new_grid = model.patch_embed.grid_size
    resampled = resample_pos_embed(
        patches, new_grid, grid, num_prefix_tokens=0, interpolation=interpolation, antialias=antialias
    )
    if resampled is not patches:
        old = grid or (isqrt(patches.shape[1]),) * 2
        notes.append(f"position embeddings resampled from {old[0]} x {old[1]} to {new_grid[0]} x {new_grid[1]} patches")
    wanted = model.num_embedded_prefix_tokens
    # the file's rows by role, class token first
    class_row = rows[:, :1] if prefix > (0 if has_class or prefix == 1 else registers) else None
    register_rows = rows[:, prefix - registers :] if registers and prefix >= registers + int(has_class) else None
    if wanted == prefix and has_class == (model.cls_token is not None):
        weights["pos_embed"] = torch.cat([rows, resampled], dim=1)
        return
    if wanted == 0:  # a token's position is one more vector added to it
        for name, row in (("cls_token", class_row), ("reg_token", register_rows)):
            if row is not None and name in weights:
                weights[name] = weights[name] + row
    else:
        blank = torch.zeros_like(ours[:, :1], device=theirs.device, dtype=theirs.dtype)
        new_rows = [] if model.cls_token is None else [blank if class_row is None else class_row]
        if model.reg_token is not None:
            count = model.reg_token.shape[1]
            found = blank[:, :0] if register_rows is None else register_rows[:, :count]
            new_rows += [found, blank.expand(-1, count - found.shape[1], -1)]
        resampled = torch.cat([*new_rows, resampled], dim=1)
    notes.append(f"position embeddings of {prefix} prefix tokens became those of {wanted}")
    weights["pos_embed"] = resampled


def _prefix_rows(rows: int, class_tokens: int, registers: int, grid: tuple[int, int] | None) -> int:
    """How many of the rows of pos_embed belong to prefix tokens, told by what leaves a grid."""
    if grid is not None:
        return rows - grid[0] * grid[1]
    choices = dict.fromkeys((class_tokens + registers, class_tokens, 0, 1))
    for choice in choices:
        if isqrt(rows - choice) ** 2 == rows - choice:
            return choice
    raise ValueError(
        f"pos_embed has {rows} rows, which is no square grid with {' or '.join(map(str, choices))} prefix tokens;"
        " give grid=(rows, columns)"
    )


def _tokens(weights: Weights, own: Weights, notes: list[str]) -> None:
    for key, what in (("cls_token", "class token"), ("reg_token", "register tokens")):
        if key in weights and key not in own:
            notes.append(f"{what} left out: the model has none")
            del weights[key]
        elif key in own and key not in weights and "patch_embed.proj.weight" in weights:
            notes.append(f"{what} not in the file: they keep their start")
            weights[key] = own[key]
        elif key in own and key in weights and weights[key].shape[1:2] != own[key].shape[1:2]:
            have, want = weights[key].shape[1], own[key].shape[1]
            notes.append(f"{want} {what} from {have}" + (": the others keep their start" if want > have else ""))
            weights[key] = torch.cat([weights[key][:, :want], own[key][:, have:].to(weights[key])], dim=1)


def _norm_and_pool(model: VisionTransformer, weights: Weights, own: Weights, notes: list[str]) -> None:
    for there, here in (("norm", "fc_norm"), ("fc_norm", "norm")):
        if f"{there}.weight" in weights and f"{there}.weight" not in own and f"{here}.weight" in own:
            notes.append(f"the final norm became {here}: pooling and norm change places")
            for kind in ("weight", "bias"):
                weights[f"{here}.{kind}"] = weights.pop(f"{there}.{kind}")
    pool = [key for key in weights if key.startswith("attn_pool.")]
    if pool and model.attn_pool is None:
        notes.append(f"attention pooling left out: the model pools by {model.global_pool!r}")
        for key in pool:
            del weights[key]


def _head(weights: Weights, own: Weights, notes: list[str]) -> None:
    tanh_lost = "pre_logits.fc.weight" in weights and "pre_logits.fc.weight" not in own
    if "head.weight" in own and "patch_embed.proj.weight" in weights:
        theirs, ours = weights.get("head.weight"), own["head.weight"]
        if theirs is None or theirs.shape != ours.shape or tanh_lost:
            had = "none" if theirs is None else f"one of {theirs.shape[0]} classes"
            behind = " behind a tanh layer, which is left out" if tanh_lost else ""
            notes.append(f"new zero-initialised head for {ours.shape[0]} classes; the file has {had}{behind}")
            weights["head.weight"] = torch.zeros_like(ours)
            weights.pop("head.bias", None)
        if "head.bias" not in weights and "head.bias" in own:
            weights["head.bias"] = torch.zeros_like(own["head.bias"])
    elif "head.weight" not in own and "head.weight" in weights:
        notes.append("head left out: the model has none")
        for key in [key for key in weights if key.startswith("head.")]:
            del weights[key]
        tanh_lost = "pre_logits.fc.weight" in weights and "pre_logits.fc.weight" not in own
    if tanh_lost:
        for key in [key for key in weights if key.startswith("pre_logits.")]:
            del weights[key]
