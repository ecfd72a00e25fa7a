"""Numbers as 8-bit integers times a scale: weights once for each output, activations for each row as it comes.

Both are symmetric, integers -127..127 with the scale largest magnitude / 127 (as Jacob et al. 2018, arXiv:1712.05877, with a
zero-point of 0). What decides the integers is computed in fp32 whatever the dtype, so that every backend gets the same ones.

Legend: T rows, I inputs, O outputs, W = I / 4 rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

LEVELS = 127
_LEAST_MAGNITUDE = 1e-30  # so that LEVELS / magnitude is finite; a row of less becomes 0
PANEL_COLUMNS, PANEL_STEP = 64, 16  # as in csrc/cpu/linear.h
TILE_ROWS, TILE_BYTES = 16, 64  # of AMX, as in csrc/cpu/tile_pack.h


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [..., I] and scales [..., 1], both fp32, whose product is nearest to x; rows with NaN or infinity get scale NaN."""
    magnitude = x.float().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1)).float()
    finite = magnitude.isfinite()
    bounded = torch.where(finite, magnitude, 1.0).clamp(min=_LEAST_MAGNITUDE)
    levels = torch.full_like(bounded, LEVELS)  # a number over a tensor would be its reciprocal times the number
    integers = (x.float() * (levels / bounded)).round().clamp(-LEVELS, LEVELS)
    return integers.nan_to_num(0.0), torch.where(finite, bounded / levels, torch.nan)


def dequantize_rows(x: Tensor) -> Tensor:
    """x rounded to the nearest of its row's levels, in x's dtype (fp32 for half precisions)."""
    integers, scale = quantize_rows(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return integers.to(wide) * scale.to(wide)


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [O, I] as the C++ product of 8-bit integers takes it.

    Returns (words, start, scale): panels of 64 outputs (the last rounded up to 16) as int32 [W, columns] one after the
    other, each word holding 4 neighbours along I; int32 -128 times the sum of each output's integers, which makes up for
    activations being stored plus 128; fp32 [O].
    """
    integers, start, scale = _integers(weight)
    words = _words(integers, PANEL_STEP, 4)
    panels = [panel.t().flatten() for panel in words.split(PANEL_COLUMNS)]
    return torch.cat(panels) if panels else words.flatten(), start, scale


def pack_weight_for_tiles(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same, the words for AMX: int32 [O / 32, I / 64, 2, 16 words, 16 outputs], both counts rounded up."""
    integers, start, scale = _integers(weight)
    words = _words(integers, 2 * TILE_ROWS, TILE_BYTES)
    blocks, steps = words.shape[0] // (2 * TILE_ROWS), words.shape[1] // (TILE_BYTES // 4)
    tiles = words.view(blocks, 2, TILE_ROWS, steps, TILE_BYTES // 4)  # block, tile, output, step, word
    return tiles.permute(0, 3, 1, 4, 2).flatten(), start, scale


def _integers(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """int8 [O, I], the start of each output's sums, its outputs rounded up to PANEL_STEP, and the scales [O]."""
    integers, scale = quantize_rows(weight.contiguous())
    start = -128 * nn_functional.pad(
        integers.to(torch.int32).sum(1, dtype=torch.int32), (0, -weight.shape[0] % PANEL_STEP)
    )
    return integers.to(torch.int8), start, scale.flatten()


def _words(integers: Tensor, lines: int, numbers: int) -> Tensor:
    """int32 [O, I / 4], with zeros up to whole ``lines`` and ``numbers``."""
    padded = nn_functional.pad(integers, (0, -integers.shape[1] % numbers, 0, -integers.shape[0] % lines))
    return (
        padded.view(torch.int32)
        if padded.numel()
        else padded.new_empty(padded.shape[0], padded.shape[1] // 4, dtype=torch.int32)
    )
