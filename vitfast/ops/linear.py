"""A linear layer through the product that measures fastest (see ``products.py`` and ``raw.py``).

Legend: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as linear_ref

from .arguments import cast, check_linear, fake_gradients, gradients, product_dtype, rows, wanted_only
from .compose import column_sum
from .dispatch import FORCED, TABLE, choose, standard_backends
from .library import register

__all__ = ["linear", "linear_ref"]

TABLE["linear"] = standard_backends("cpu", "triton", "torch", *FORCED)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    out = choose("linear", x, backend, dtype).linear(rows(x, dtype), weight.to(dtype), cast(bias, dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    dtype, d_TO = d_out.dtype, rows(d_out)
    kernels = choose("linear", x, backend, dtype)
    grads = (
        kernels.input_grad(d_TO, weight.to(dtype)) if wanted[0] else None,
        kernels.weight_grad(d_TO, rows(x, dtype)) if wanted[1] else None,
        column_sum(d_TO) if wanted[2] else None,
    )
    return gradients(grads, (x, weight, bias), wanted, d_out)


def _fake_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return fake_gradients((x, weight, bias), wanted, d_out)


_linear_backward = register(
    "linear_backward(Tensor d_out, Tensor x, Tensor weight, Tensor? bias, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    return *wanted_only(_linear_backward(d_out, *ctx.saved_tensors, wanted, ctx.backend), wanted), None, None


_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, ScalarType dtype, str backend) -> Tensor",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + b.

    Args:
        x: [..., I].
        weight: [O, I].
        bias: [O] or None.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [..., O] in the weight's dtype, or in autocast's.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    check_linear("", weight, bias, x.shape[-1])
    return _linear(x, weight, bias, product_dtype(x, weight), backend)
