"""Images of different sizes in one pass without padding: NaViT's patch packing (Dehghani et al. 2023, arXiv:2307.06304).

C channels, Hi x Wi pixels, L tokens of an image, T tokens of all images, S images, D width, K classes, E head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.layers.tokens import Rope, Tokens

if TYPE_CHECKING:
    from vitfast.models.vit import VisionTransformer


def forward_packed(model: VisionTransformer, images: Sequence[Tensor]) -> Tensor:
    """Logits [S, K] of images of different sizes, [C, Hi, Wi] each, in one pass without padding.

    Sides are multiples of the patch size (with dynamic_img_pad any), positions are resampled to each size; equal to
    running each image alone with dynamic_img_size. Raises ValueError for images that do not fit.
    """
    # Images of one size are embedded together, and the packed sequence is sorted by size, so that each size is a dense
    # batch again for pooling and head.
    _check(model, images)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(number)
    starts, ropes, lengths = [], [], []
    for members in groups.values():
        x_BLD, tokens = model.start(torch.stack([images[i] for i in members]), any_size=True)
        starts.append(x_BLD)
        ropes.append(tokens.rope)
        lengths += [x_BLD.shape[1]] * len(members)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = Tokens(
        rope=_packed_rope(ropes, starts),
        cu_seqlens=bounds.to(starts[0].device),
        max_seqlen=max(lengths),
    )
    x_TD = torch.cat([x_BLD.flatten(0, 1) for x_BLD in starts])
    for i, block in enumerate(model.blocks):
        x_TD, packed = model.run_block(i, block, x_TD, packed)
    parts = model.norm(x_TD).split([x_BLD.shape[:2].numel() for x_BLD in starts])
    outputs = [
        model.forward_head(part.unflatten(0, x_BLD.shape[:2])) for part, x_BLD in zip(parts, starts, strict=True)
    ]
    order = torch.tensor([number for members in groups.values() for number in members]).argsort()
    return torch.cat(outputs)[order.to(outputs[0].device)]


def _packed_rope(ropes: list[Rope | None], starts: list[Tensor]) -> Rope | None:
    """Tables of all T tokens, [T, E] (learned ones [layers, T, H, E]), with no rotation for prefix tokens."""
    first = ropes[0]
    if first is None:
        return None
    tables: list[list[Tensor]] = [[], []]
    for rope, x_BLD in zip(ropes, starts, strict=True):
        assert rope is not None
        B, L, _ = x_BLD.shape
        axis = 0 if rope.shared else 1
        for kind, table in enumerate((rope.cos, rope.sin)):
            prefix = L - table.shape[axis]
            pad = (0, 0) * (table.ndim - axis - 1) + (prefix, 0)
            table = F.pad(table, pad, value=1.0 - kind)  # cos 1, sin 0
            tables[kind].append(torch.cat([table] * B, axis))
    axis = 0 if first.shared else 1
    return first._replace(cos=torch.cat(tables[0], axis), sin=torch.cat(tables[1], axis))


def _check(model: VisionTransformer, images: Sequence[Tensor]) -> None:
    config, patch = model.config, model.patch_embed.patch_size[0]
    if config.token_merging:
        raise ValueError("forward_packed does not go with token_merging: it merges the same number in every image")
    if config.patch_drop_rate and model.training:
        raise ValueError("forward_packed does not go with patch_drop_rate in training; use eval() or a rate of 0")
    if config.global_pool == "" and len({tuple(image.shape) for image in images}) > 1:
        raise ValueError("forward_packed needs a pooling for images of different sizes, got global_pool=''")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    for number, image in enumerate(images):
        if image.ndim != 3:
            raise ValueError(f"images[{number}] must be [C, H, W], got shape {tuple(image.shape)}")
        if not config.dynamic_img_pad and any(side % patch for side in image.shape[1:]):
            raise ValueError(f"images[{number}] must be multiples of the patch size {patch}, got {tuple(image.shape)}")
