"""Changing a model that exists: its classifier, its input size, its depth; and what optimizers ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from vitfast.layers.resample import resample_pos_embed
from vitfast.models.config import POOLINGS, check_choice
from vitfast.models.intermediates import block_indices

if TYPE_CHECKING:
    from vitfast.models.vit import VisionTransformer


def get_classifier(model: VisionTransformer) -> nn.Module:
    """The head."""
    return model.head


def reset_classifier(model: VisionTransformer, num_classes: int, global_pool: str | None = None) -> None:
    """Replaces the whole head, tanh layer included, by one zero-initialised linear (Dosovitskiy et al., B.1.1).

    num_classes = 0 leaves none. global_pool, if given, changes the pooling; attention pooling can be removed
    but not added. The final norm stays where it is. Raises ValueError.
    """
    changes: dict[str, Any] = {"num_classes": num_classes, "representation_size": None}
    if global_pool is not None:
        check_choice("global_pool", global_pool, POOLINGS)
        if global_pool == "token" and model.cls_token is None:
            raise ValueError("global_pool='token' needs a class token, and this model has none")
        if global_pool == "map" and model.attn_pool is None:
            raise ValueError("global_pool='map' cannot be added here; create the model with it")
        if global_pool != "map":
            model.attn_pool = None
        changes |= {"fc_norm": model.config.norm_after_pool, "global_pool": global_pool}
        model.global_pool = global_pool
    model.config = dataclasses.replace(model.config, **changes)
    model.num_classes = num_classes
    model.pre_logits = nn.Identity()
    model.head = nn.Identity()
    if num_classes:
        like = model.patch_embed.proj.weight
        model.head = nn.Linear(model.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)


def set_input_size(
    model: VisionTransformer, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
) -> None:
    """Take images of another size from now on, or cut them into other patches; None keeps what is.

    Position embeddings are resampled (bicubic) to the new grid, patch filters by FlexiViT's PI-resize; both are new
    parameters then, so an optimizer has to be made after this. Raises ValueError.
    """
    config = model.config
    size = config.img_size if img_size is None else img_size
    if isinstance(patch_size, Sequence):
        raise ValueError(f"patch_size must be one number: patches are square here, got {patch_size}")
    config = dataclasses.replace(config, img_size=size, patch_size=patch_size or config.patch_size)
    before = model.patch_embed.grid_size
    model.patch_embed.set_input_size(config.image_hw, config.patch_size)
    model.config = config
    if model.pos_embed is not None and model.patch_embed.grid_size != before:
        resampled = resample_pos_embed(
            model.pos_embed.detach(),
            model.patch_embed.grid_size,
            before,
            num_prefix_tokens=model.num_embedded_prefix_tokens,
        )
        model.pos_embed = nn.Parameter(resampled, requires_grad=model.pos_embed.requires_grad)


def set_precision(model: VisionTransformer, precision: str) -> None:
    """What inference multiplies in from now on: "float", the parameters' dtype, or "int8" (see ``ViTConfig``).

    The parameters are not touched. Raises ValueError.
    """
    model.config = dataclasses.replace(model.config, precision=precision)
    for block in model.blocks:
        block.precision = precision  # type: ignore[assignment]


def prune_intermediate_layers(
    model: VisionTransformer,
    indices: int | Sequence[int] = 1,
    prune_norm: bool = False,
    prune_head: bool = True,
) -> list[int]:
    """Removes what ``forward_intermediates(indices)`` does not need: later blocks, norm, head. Returns the blocks.

    With ``prune_norm`` the model has no final norm any more. Raises ValueError for an index without a block.
    """
    chosen = block_indices(len(model.blocks), indices)
    model.blocks = model.blocks[: max(chosen) + 1]
    model.config = dataclasses.replace(model.config, depth=len(model.blocks))
    if prune_norm:
        model.norm = nn.Identity()
    if prune_head:
        model.fc_norm = nn.Identity()
        model.reset_classifier(0, "")
    if isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity):
        model.config = dataclasses.replace(model.config, final_norm=False)
    return chosen


def set_grad_checkpointing(model: VisionTransformer, enable: bool = True) -> None:
    """timm's switch: recompute "block" when enabled, otherwise only what the blocks recompute by themselves."""
    model.recompute = "block" if enable else model.config.block_recompute


def no_weight_decay(model: VisionTransformer) -> set[str]:
    """Parameters that optimizers should not decay, beside biases and norms."""
    learned_rope = {"rope.freqs"} if model.config.rope_type == "mixed" else set()
    return {"pos_embed", "cls_token", "reg_token"} | learned_rope


def group_matcher(model: VisionTransformer, coarse: bool = False) -> dict[str, Any]:
    """timm's patterns for layer-wise learning rates: the stem, then each block; ``coarse`` changes nothing here."""
    stem = r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre"
    return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}
