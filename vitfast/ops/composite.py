"""The primitive kernels as ordinary differentiable PyTorch functions: backend "composite".

PyTorch's own autograd, transforms and exporters see through these, so every op takes them inside a ``torch.func`` transform,
under forward-mode differentiation and in ONNX export (see ``library.py``), and a caller may name them for derivatives of
higher order. They keep what autograd keeps, which is more than an op with its written-out backward does.

Same functions, meaning and shapes as ``plain.py``, which documents them. Legend: T rows, S packed sequences, D width, H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from . import plain
from .arguments import nothing, statistics_dtype
from .heads import Heads, transform


class CompositeKernels(plain.PlainKernels):
    """Plain kernels whose forward primitives write into nothing and leave no intermediate result to a backward."""

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        return nn_functional.linear(x_TI, weight_OI, bias_O)

    def linear_activation(
        self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kind: str, keep: bool
    ) -> tuple[Tensor, Tensor]:
        return plain.activation_forward(self.linear(x_TI, weight_OI, bias_O), kind), nothing(x_TI)

    def linear_residual(
        self,
        residual_TO: Tensor,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scale_O: Tensor | None,
        drop_path_B: Tensor | None,
    ) -> Tensor:
        return plain.scale_add(residual_TO, self.linear(x_TI, weight_OI, bias_O), scale_O, drop_path_B)

    def layer_norm_forward(
        self,
        x_TD: Tensor,
        branch_TD: Tensor | None,
        scale_D: Tensor | None,
        drop_path_B: Tensor | None,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = x_TD if branch_TD is None else plain.scale_add(x_TD, branch_TD, scale_D, drop_path_B)
        wide = statistics_dtype(total)
        normed = nn_functional.layer_norm(total.to(wide), weight_D.shape, weight_D.to(wide), bias_D.to(wide), eps)
        return total, normed.to(dtype), nothing(total), nothing(total)

    def attention_forward(
        self,
        qkv: Tensor,
        scale: float,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        padding_BL: Tensor | None,
        heads: Heads,
    ) -> tuple[Tensor, Tensor]:
        """A packed batch is one sequence here, with a mask [T, T] that keeps its images apart."""
        if heads.active:
            qkv = transform(qkv, heads)
        q, k, v = (qkv if cu_seqlens is None else qkv.unsqueeze(0)).unbind(-3)  # [B, L, H, E] each
        q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
        logits = (q @ k.transpose(-2, -1)).to(statistics_dtype(qkv)) * scale
        hidden = None if padding_BL is None else padding_BL[:, None, None]
        if cu_seqlens is not None:
            image_T = torch.bucketize(torch.arange(qkv.shape[0], device=qkv.device), cu_seqlens, right=True)
            hidden = image_T[:, None] != image_T[None, :]
        out = (_softmax(logits, bias, hidden).to(v.dtype) @ v).transpose(-3, -2)
        return (out if cu_seqlens is None else out.squeeze(0)), nothing(qkv)


def _softmax(logits: Tensor, bias: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Zeros, and gradients of zero, where every key is hidden by -inf in ``bias`` or by ``hidden``."""
    if bias is None and hidden is None:
        return logits.softmax(-1)
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -math.inf)
    blind = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


KERNELS = CompositeKernels()
