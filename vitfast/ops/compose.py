"""Pieces that several ops are composed of: the two products of an MLP, and a projection added to the residual stream.

Legend: T rows, D width, F hidden width, H = F, or 2F where "swiglu" has a gate beside each, I inputs, O outputs; ``X`` dtype of
the residual stream, ``Y`` of the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional


def add_branch_ref(residual: Tensor, branch: Tensor, scale: Tensor | None, drop_path: Tensor | None) -> Tensor:
    """residual + drop_path * scale * branch in plain PyTorch, [B, ..., D]; part of several references."""
    if scale is not None:
        branch = branch * scale
    if drop_path is not None:
        branch = branch * drop_path.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    return residual + branch


def activation_ref(h: Tensor, activation: str) -> Tensor:
    """act(h) in plain PyTorch, [..., F], or [..., 2F] -> [..., F] for "swiglu"; part of several references."""
    if activation == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return nn_functional.silu(gate) * up
    if activation == "quick_gelu":
        return h * torch.sigmoid(1.702 * h)
    return nn_functional.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def branch_grads(
    d_out_TO: Tensor, scale_O: Tensor | None, drop_path_B: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradient behind DropPath, and behind DropPath and LayerScale -> two [T, O] in Y (one tensor without a scale)."""
    dropped = d_out_TO
    if drop_path_B is not None and drop_path_B.numel():
        repeats = d_out_TO.shape[0] // drop_path_B.numel()
        dropped = dropped * drop_path_B.to(d_out_TO.dtype).repeat_interleave(repeats).unsqueeze(1)
    if scale_O is None:
        dropped = dropped.to(dtype)
        return dropped, dropped
    return dropped.to(dtype), (dropped * scale_O.to(dropped.dtype)).to(dtype)


def project_weight_grads(
    kernels: Any,
    dropped_TO: Tensor,
    branch_TO: Tensor,
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    scale_O: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_weight [O, I], d_bias [O], d_scale [O]), None for each that is not wanted.

    With G = dropped^T x, the gradient of LayerScale is rowsum(G * W) + b * sum(dropped): the projection's output need not
    be kept for it, and the weight's own gradient is scale * G.
    """
    want_weight, want_bias, want_scale = wanted
    if scale_O is None:
        d_weight = kernels.weight_grad(branch_TO, x_TI) if want_weight else None
        return d_weight, column_sum(branch_TO) if want_bias else None, None
    sums_O = column_sum(dropped_TO) if want_bias or want_scale else None
    product_OI = kernels.weight_grad(dropped_TO, x_TI) if want_weight or want_scale else None
    d_scale = None
    if want_scale and product_OI is not None and sums_O is not None:
        d_scale = (product_OI.to(sums_O.dtype) * weight_OI.to(sums_O.dtype)).sum(1)
        if bias_O is not None:
            d_scale = d_scale + bias_O.to(sums_O.dtype) * sums_O
    wide = scale_O if scale_O.dtype == torch.float64 else scale_O.float()
    d_weight = product_OI * wide.unsqueeze(1) if want_weight and product_OI is not None else None
    return d_weight, sums_O * wide if want_bias and sums_O is not None else None, d_scale


def hidden_grads(
    kernels: Any,
    d_out_TO: Tensor,
    weight_OF: Tensor,
    h_TH: Tensor,
    act_TF: Tensor | None,
    x_TD: Tensor,
    weight_HD: Tensor,
    activation: str,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """From the gradient of out = act(h) weight_OF^T and h = x weight_HD^T + b: (d_x [T, D], act(h) [T, F],
    d_weight [H, D], d_bias [H]); the last two None where not wanted."""
    d_h, act, d_bias = kernels.hidden_backward(d_out_TO, weight_OF, h_TH, activation, act_TF is None)
    d_weight = kernels.weight_grad(d_h, x_TD) if wanted[0] else None
    return (
        kernels.input_grad(d_h, weight_HD),
        act if act_TF is None else act_TF,
        d_weight,
        d_bias if wanted[1] else None,
    )


def column_sum(x_TO: Tensor) -> Tensor:
    """Sum over rows, accumulated in fp32 (fp64 for fp64) -> [O]."""
    return x_TO.sum(0, dtype=torch.float64 if x_TO.dtype == torch.float64 else torch.float32)
