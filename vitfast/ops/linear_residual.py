"""A projection added to the residual stream, with LayerScale and DropPath: a block's way out of attention.

Legend: B samples, T = B * L rows, I inputs, O outputs; ``X`` dtype of the residual stream, ``Y`` of the product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from .arguments import (
    cast,
    check_drop_path,
    check_linear,
    check_shape,
    fake_gradients,
    gradients,
    product_dtype,
    rows,
    wanted_only,
)
from .compose import add_branch_ref, branch_grads, project_weight_grads
from .dispatch import FORCED, TABLE, choose, standard_backends, too_wide
from .library import register

TABLE["linear_residual"] = standard_backends("cpu", "triton", "cuda", "torch", *FORCED)


def linear_residual_ref(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    return add_branch_ref(residual, torch_linear(x, weight, bias), scale, drop_path)


def _forward(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kernels = choose("linear_residual", residual, backend, dtype, why_not=too_wide(residual))
    total = kernels.linear_residual(
        rows(residual), rows(x, dtype), weight.to(dtype), cast(bias, dtype), scale, drop_path
    )
    return total.view(residual.shape)


def _fake_forward(residual: Tensor, *_: Any) -> Tensor:
    return residual.new_empty(residual.shape)


def _backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    dtype: torch.dtype,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("linear_residual", d_out, backend, dtype, why_not=too_wide(d_out))
    weight_OI = weight.to(dtype)
    dropped, branch = branch_grads(rows(d_out), scale, drop_path, dtype)
    d_x = kernels.input_grad(branch, weight_OI) if wanted[0] else None
    d_weight, d_bias, d_scale = project_weight_grads(
        kernels, dropped, branch, rows(x, dtype), weight_OI, bias, scale, (wanted[1], wanted[2], wanted[3])
    )
    return gradients((d_x, d_weight, d_bias, d_scale), (x, weight, bias, scale), wanted, d_out)


def _fake_backward(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _drop_path, _dtype, wanted, _backend = rest
    return fake_gradients(inputs, wanted, d_out)


_linear_residual_backward = register(
    "linear_residual_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? drop_path, "
    "ScalarType dtype, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, weight, bias, scale, drop_path, ctx.dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, scale, drop_path)


def _autograd(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[1:5])
    grads = _linear_residual_backward(d_out, *ctx.saved_tensors, ctx.dtype, wanted, ctx.backend)
    return d_out, *wanted_only(grads, wanted), None, None, None


_linear_residual = register(
    "linear_residual(Tensor residual, Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? drop_path, "
    "ScalarType dtype, str backend) -> Tensor",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def linear_residual(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """residual + drop_path * scale * (x W^T + b).

    Args:
        residual: [B, ..., O] in X.
        x: [B, ..., I].
        weight: [O, I].
        bias: [O] or None.
        scale: LayerScale's factor [O] (arXiv:2103.17239, eq. 4), or None.
        drop_path: one factor for each sample [B], mask / keep probability (arXiv:1603.09382), or None; no gradient.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [B, ..., O] in X. Keeps only x for backward: LayerScale's gradient comes from the weight's.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    check_linear("", weight, bias, x.shape[-1])
    check_shape("residual", residual, (*x.shape[:-1], weight.shape[0]))
    check_shape("scale", scale, weight.shape[:1])
    check_drop_path(drop_path, residual)
    dtype = product_dtype(x, weight)
    return _linear_residual(residual, x, weight, bias, scale, drop_path, dtype, backend)
