"""LayerNorm and the linear layer behind it as one unit, so that the normalised tensor need not be kept for backward.

Legend: T = B * L rows, D width, O outputs; ``X`` dtype of the residual stream, ``Y`` of the product.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import (
    cast,
    check_linear,
    check_policy,
    check_shape,
    fake_gradients,
    fake_statistics,
    gradients,
    nothing,
    product_dtype,
    rows,
    wanted_only,
)
from .compose import column_sum
from .dispatch import FORCED, TABLE, choose, standard_backends, too_wide
from .library import register

TABLE["norm_linear"] = standard_backends("cpu", "triton", "cuda", "torch", *FORCED)


def norm_linear_ref(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    normed = nn_functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    return nn_functional.linear(normed, weight, bias)


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    policy: str,
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("norm_linear", x, backend, dtype, why_not=too_wide(x))
    _, normed, mean, rstd = kernels.layer_norm_forward(rows(x), None, None, None, norm_weight, norm_bias, eps, dtype)
    out = kernels.linear(normed, weight.to(dtype), cast(bias, dtype))
    return out.view(*x.shape[:-1], weight.shape[0]), mean, rstd, normed if policy == "none" else nothing(normed)


def _fake_forward(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, dtype, policy, _backend = rest
    return (
        x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype),
        *fake_statistics(x),
        x.new_empty((math.prod(x.shape[:-1]), x.shape[-1]) if policy == "none" else (0,), dtype=dtype),
    )


def _backward(
    d_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    normed: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    dtype, d_TO, x_TD = d_out.dtype, rows(d_out), rows(x)
    kernels = choose("norm_linear", x, backend, dtype, why_not=too_wide(x))
    want_x, want_norm_weight, want_norm_bias, want_weight, want_bias = wanted
    if want_weight and normed.numel() == 0:
        normed = kernels.layer_norm_apply(x_TD, mean, rstd, norm_weight, norm_bias, dtype)
    d_x = d_norm_weight = d_norm_bias = None
    if want_x or want_norm_weight or want_norm_bias:
        d_normed = kernels.input_grad(d_TO, weight.to(dtype))
        d_x, _, _, d_norm_weight, d_norm_bias = kernels.layer_norm_backward(
            d_normed, None, x_TD, mean, rstd, norm_weight
        )
    d_weight = kernels.weight_grad(d_TO, normed) if want_weight else None
    d_bias = column_sum(d_TO) if want_bias else None
    grads = (d_x, d_norm_weight, d_norm_bias, d_weight, d_bias)
    return gradients(grads, (x, norm_weight, norm_bias, weight, bias), wanted, d_out)


def _fake_backward(
    d_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, normed: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *parameters, wanted, _backend = rest
    return fake_gradients((x, *parameters), wanted, d_out)


_norm_linear_backward = register(
    "norm_linear_backward(Tensor d_out, Tensor x, Tensor mean, Tensor rstd, Tensor normed, Tensor norm_weight, "
    "Tensor norm_bias, Tensor weight, Tensor? bias, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, weight, bias, _, _, _, ctx.backend = inputs
    _, *statistics = output
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *statistics, norm_weight, norm_bias, weight, bias)


def _autograd(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:5])
    grads = _norm_linear_backward(d_out, *ctx.saved_tensors, wanted, ctx.backend)
    return *wanted_only(grads, wanted), None, None, None, None


_norm_linear = register(
    "norm_linear(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, float eps, "
    "ScalarType dtype, str policy, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    recompute: str = "fused",
    backend: str = "auto",
) -> Tensor:
    """linear(layer_norm(x)): a pre-norm block's way into attention.

    Args:
        x: [..., D] in X.
        norm_weight, norm_bias: [D].
        weight: [O, D].
        bias: [O] or None.
        eps: added to the variance.
        recompute: "none" keeps the normalised tensor for backward; "fused" and "mlp" make it again from x (the same bits).
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [..., O] in Y: autocast's dtype, else the weight's.

    Raises:
        ValueError: a shape does not fit, or ``recompute`` is another word.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    check_shape("norm_weight", norm_weight, x.shape[-1:])
    check_shape("norm_bias", norm_bias, x.shape[-1:])
    check_linear("", weight, bias, x.shape[-1])
    policy = check_policy(recompute, x, norm_weight, norm_bias, weight, bias)
    return _norm_linear(x, norm_weight, norm_bias, weight, bias, eps, product_dtype(x, weight), policy, backend)[0]
