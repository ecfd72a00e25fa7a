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
    integers, scale = quantize_rows(weight.contiguous())
    outputs, inputs = weight.shape
    padded = nn_functional.pad(integers.to(torch.int8), (0, -inputs % 4, 0, -outputs % PANEL_STEP))
    words = padded.view(torch.int32) if inputs else padded.new_empty(padded.shape[0], 0, dtype=torch.int32)
    panels = [panel.t().flatten() for panel in words.split(PANEL_COLUMNS)]
    packed = torch.cat(panels) if panels else words.flatten()
    return packed, -128 * padded.sum(1, dtype=torch.int32), scale.flatten()
