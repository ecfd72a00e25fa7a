"""What the two halves of a pre-norm block compute with, whoever's modules hold it.

D width, H heads, E head dim, F mlp hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitfast.ops import HeadNorm

# Draws one DropPath factor for each sample: (x [B, ...], dtype of the branch) -> [B].
Draw = Callable[[Tensor, torch.dtype], Tensor]


class Norm(NamedTuple):
    """A LayerNorm over the last dimension."""

    weight: Tensor
    bias: Tensor
    eps: float


class Linear(NamedTuple):
    """A dense layer.

    ``bias_parts`` is what a bias was joined from that no module holds, of equal sizes; None in it stands for zeros.
    """

    weight: Tensor
    bias: Tensor | None
    bias_parts: tuple[Tensor | None, ...] = ()


class AttentionHalf(NamedTuple):
    """x + drop_path * gamma * proj(out_norm(attention(qkv(norm(x))))).

    ``qkv`` holds one packed projection to 3 * H * E, or those of q, k and v.
    """

    norm: Norm
    qkv: tuple[Linear, ...]
    heads: int
    scale: float
    proj: Linear
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    out_norm: Norm | None = None
    gamma: Tensor | None = None
    draw: Draw | None = None

    @property
    def plain(self) -> bool:
        """Whether the op for inference, which has no norms of q, k and heads and no DropPath, computes all of it."""
        return all(extra is None for extra in (self.q_norm, self.k_norm, self.out_norm, self.draw))


class MlpHalf(NamedTuple):
    """x + drop_path * gamma * fc2(inner_norm(activation(fc1(norm(x))))); a second fc1 is the one that a gate multiplies."""

    norm: Norm
    fc1: tuple[Linear, ...]
    activation: str
    fc2: Linear
    inner_norm: Norm | None = None
    gamma: Tensor | None = None
    draw: Draw | None = None

    @property
    def plain(self) -> bool:
        """Nothing between the activation and fc2, and no DropPath."""
        return self.inner_norm is None and self.draw is None


class Halves(NamedTuple):
    """A block. ``precision`` is what its products multiply in: "float", the parameters' dtype or autocast's, or "int8"."""

    attention: AttentionHalf
    mlp: MlpHalf
    precision: str = "float"
