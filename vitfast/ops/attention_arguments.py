"""Checks of attention's arguments, and the forms its kernels take them in.

Legend: B images, L tokens, H heads, E head dim, T rows of a packed batch, S packed sequences, N rotated tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_shape
from .heads import HeadNorm, Rope


def check_attention(
    qkv: Tensor,
    bias: Tensor | None,
    rope: Rope | None,
    norms: dict[str, HeadNorm | None],
    key_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    """Raise ValueError, naming the argument, unless all shapes and dtypes fit together."""
    _check_lengths(qkv, cu_seqlens, max_seqlen)
    E = qkv.shape[-1]
    if cu_seqlens is not None and bias is not None:
        raise ValueError("bias is given with cu_seqlens; allowed: one of the two")
    if key_padding_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("key_padding_mask is given with cu_seqlens; a packed batch has no padding")
        if key_padding_mask.dtype != torch.bool:
            raise ValueError(f"key_padding_mask is {key_padding_mask.dtype}; allowed: torch.bool, True for padding")
        check_shape("key_padding_mask", key_padding_mask, qkv.shape[:2])
    for name, norm in norms.items():
        if norm is not None:
            check_shape(f"{name}'s weight", norm.weight, (E,))
            check_shape(f"{name}'s bias", norm.bias, (E,))
    if rope is not None:
        if E % 2:
            raise ValueError(f"rope is given with head dim {E}; allowed: an even one")
        rows, most = qkv.shape[-4], "" if cu_seqlens is not None else "N <= "
        for name, table in (("rope's cos", rope.cos), ("rope's sin", rope.sin)):
            fits = table.dim() == 2 and (table.shape[0] <= rows if most else table.shape[0] == rows)
            if not fits or table.shape[1] not in (E, E // 2) or table.shape != rope.cos.shape:
                raise ValueError(
                    f"{name} has shape {tuple(table.shape)}; allowed: ({most}{rows}, {E}) or ({most}{rows}, {E // 2}), "
                    "the same for both"
                )


def _check_lengths(qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    packed = cu_seqlens is not None
    if qkv.dim() != (4 if packed else 5) or qkv.shape[-3] != 3:
        allowed = "(T, 3, H, E) with cu_seqlens" if packed else "(B, L, 3, H, E)"
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; allowed: {allowed}")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen is given without cu_seqlens")
        return
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}; allowed: (S + 1,) of torch.int32"
        )
    if max_seqlen is None:
        raise ValueError("max_seqlen is missing; cu_seqlens needs the longest sequence's length")


def dense_bias(bias: Tensor, qkv: Tensor) -> Tensor:
    """Broadcast the query and key dimensions, keep 1 for shared batch or heads -> [1 or B, 1 or H, L, L]."""
    B, L, _, H, _ = qkv.shape
    full = (B, H, L, L)
    if bias.dim() > 4 or any(b not in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: anything that broadcasts to {full}")
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    return bias.expand(*bias.shape[:2], L, L)
