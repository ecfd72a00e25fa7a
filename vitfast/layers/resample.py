"""Weights for other inputs: position embeddings on another grid, filters of another patch size or channel count.

C channels, P patch, D width, R prefix tokens, N patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    pos_embed: Tensor,
    new_size: tuple[int, int],
    old_size: tuple[int, int] | None = None,
    *,
    num_prefix_tokens: int = 1,
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """Position embeddings [1, R + N, D] for another grid of patches, interpolated in 2-D (Dosovitskiy et al., 3.2).

    new_size, old_size: rows and columns of patches; old_size None takes the old grid as square. The first
    num_prefix_tokens rows stay as they are. Computes in fp32, returns pos_embed's dtype; differentiable. Raises
    ValueError when N is not the old grid's number of patches.
    """
    prefix, grid_1ND = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    num_patches = grid_1ND.shape[1]
    if old_size is None:
        old_size = (math.isqrt(num_patches),) * 2
    if old_size[0] * old_size[1] != num_patches:
        raise ValueError(
            f"pos_embed holds {num_patches} patches beside {num_prefix_tokens} prefix tokens,"
            f" which is not a grid of {old_size[0]} x {old_size[1]}; give old_size"
        )
    if tuple(new_size) == tuple(old_size):
        return pos_embed
    # Contiguous, because PyTorch's channels-last kernel gives wrong numbers for a new grid of one column (2.14, CPU).
    grid_1DHW = grid_1ND.float().transpose(1, 2).unflatten(2, old_size).contiguous()
    grid_1DHW = F.interpolate(grid_1DHW, size=tuple(new_size), mode=interpolation, antialias=antialias)
    return torch.cat([prefix, grid_1DHW.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)


def resample_patch_embed(
    weight: Tensor, new_size: tuple[int, int], *, interpolation: str = "bicubic", antialias: bool = True
) -> Tensor:
    """Patch filters [D, C, P, P] for another patch size: FlexiViT's PI-resize (Beyer et al. 2023, 3.4).

    The new filters give a resized patch the product that the old ones gave the patch, as nearly as a least-squares fit
    can: w' = pinv(B^T) w, where B is the resize as a matrix. Computes in fp32, returns weight's dtype. Raises ValueError
    for a weight of another rank.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight must be [D, C, P, P], got shape {tuple(weight.shape)}")
    old_size = tuple(weight.shape[2:])
    if old_size == tuple(new_size):
        return weight
    pixels = old_size[0] * old_size[1]
    basis = torch.eye(pixels, device=weight.device, dtype=torch.float32).view(pixels, 1, *old_size)
    resized = F.interpolate(basis, size=tuple(new_size), mode=interpolation, antialias=antialias)
    inverse = torch.linalg.pinv(resized.flatten(1).T)  # of [new pixels, old pixels]
    return (weight.float().flatten(2) @ inverse).unflatten(2, tuple(new_size)).to(weight.dtype)


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Patch filters [D, C, P, P] for another number of channels, as timm does it.

    One channel: the sum over the old ones, so that grey images give the same products. More: the old channels repeated
    and scaled by C / in_chans, so that sums keep their size. Computes in fp32, returns weight's dtype. Raises ValueError
    for a weight of another rank or fewer than one channel.
    """
    if weight.ndim != 4 or in_chans < 1:
        raise ValueError(
            f"weight must be [D, C, P, P] and in_chans at least 1, got {tuple(weight.shape)} and {in_chans}"
        )
    channels = weight.shape[1]
    if in_chans == channels:
        return weight
    wide = weight.float()
    if in_chans == 1:
        return wide.sum(dim=1, keepdim=True).to(weight.dtype)
    wide = wide.repeat(1, -(-in_chans // channels), 1, 1)[:, :in_chans]
    return (wide * (channels / in_chans)).to(weight.dtype)
