"""A linear layer in 8-bit integers, with what surrounds it in a block: LayerNorm before, activation or residual after.

For inference only. The weight comes as it is; its integers are made at the first call and kept (see ``weight_cache.py``).

Legend: T = B * L rows, I inputs, O outputs; ``X`` dtype of x, ``Y`` of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import ACTIVATIONS, activated_width, check_linear, check_shape, rows
from .compose import activation_ref
from .dispatch import TABLE, choose, standard_backends
from .library import register
from .quantize import dequantize_rows

TABLE["int8_linear"] = standard_backends("cpu", "torch")


def int8_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch on numbers rounded to their levels; in fp64 the truth, but for the rounding to levels, which is in fp32."""
    if norm_weight is not None:
        x = nn_functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    x_q, weight_q = dequantize_rows(x), dequantize_rows(weight)
    y = nn_functional.linear(x_q, weight_q, None if bias is None else bias.to(x_q.dtype))
    if activation != "none":
        y = activation_ref(y, activation)
    if scale is not None:
        y = y * scale
    return y.to(x.dtype) if residual is None else (residual + y).to(residual.dtype)


def _forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kernels = choose("int8_linear", x, backend, dtype)
    joins = activation == "swiglu"  # columns that the product computes apart
    out = kernels.int8_linear(
        rows(x),
        norm_weight,
        norm_bias,
        eps,
        weight,
        bias,
        "none" if joins else activation,
        None if residual is None else rows(residual),
        scale,
        dtype,
    )
    if joins:
        out = kernels.activation_forward(out, activation)
    return out.view(*x.shape[:-1], out.shape[-1])


def _fake_forward(x: Tensor, *rest: Any) -> Tensor:
    _, _, _, weight, _, activation, _, _, dtype, _ = rest
    return x.new_empty((*x.shape[:-1], activated_width(weight.shape[0], activation)), dtype=dtype)


_int8_linear = register(
    "int8_linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor weight, Tensor? bias, "
    "str activation, Tensor? residual, Tensor? scale, ScalarType dtype, str backend) -> Tensor",
    _forward,
    _fake_forward,
)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """act(y), or residual + scale * y, of y = Q(norm(x)) Q(W)^T + b, where Q rounds to 255 levels; no gradient.

    Each output's weights and each row of norm(x) have levels of their own: the largest magnitude over 127, times -127 to
    127 (Jacob et al. 2018, arXiv:1712.05877, symmetric; rows at run time, so nothing has to be calibrated). The sums are
    exact. A row with NaN or infinity gives NaN. With backend "cpu" a product of int8 takes AVX-512 VNNI to be fast; the
    integers of the weight take a byte each beside the weight itself, for as long as the weight lives
    (``weight_cache.limit_bytes`` bounds it).

    Args:
        x: [B, ..., I].
        weight, bias: [O, I] and [O] or None.
        norm_weight, norm_bias, eps: LayerNorm's [I] and [I], both or neither, and what it adds to the variance.
        activation: "none", "gelu" (erf), "gelu_tanh", "quick_gelu" or "swiglu" (which halves O).
        residual, scale: [B, ..., O], and LayerScale's factor [O] (arXiv:2103.17239, eq. 4) or None; not with an activation.
        dtype: of the result, unless there is a residual, whose dtype it then has; default x's.
        backend: "auto", "cpu", or "torch", which rounds to the same levels and multiplies as floats.

    Raises:
        ValueError: a shape does not fit, or options do not go together.
        RuntimeError: a gradient is wanted; or the named backend cannot run.
    """
    check_linear("", weight, bias, x.shape[-1])
    outputs = weight.shape[0]
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_shape(name, parameter, (x.shape[-1],))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias go together; give both or neither")
    if activation not in ("none", *ACTIVATIONS):
        raise ValueError(f"activation is {activation!r}; allowed are 'none', {', '.join(map(repr, ACTIVATIONS))}")
    if activation == "swiglu" and outputs % 2:
        raise ValueError(f"weight has {outputs} rows; swiglu needs an even number, gate and up")
    if residual is None and scale is not None:
        raise ValueError("scale goes with a residual only")
    if residual is not None and (activation != "none" or dtype not in (None, residual.dtype)):
        raise ValueError("residual goes with activation 'none' and its own dtype only")
    check_shape("residual", residual, (*x.shape[:-1], outputs))
    check_shape("scale", scale, (outputs,))
    tensors = (x, weight, bias, norm_weight, norm_bias, residual, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("int8_linear has no gradient: use it under torch.no_grad(), or ops.linear and its relatives")
    kind = residual.dtype if residual is not None else dtype or x.dtype
    return _int8_linear(x, norm_weight, norm_bias, eps, weight, bias, activation, residual, scale, kind, backend)
