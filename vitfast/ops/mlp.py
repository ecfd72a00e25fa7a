"""The transformer's MLP: two linear layers with a GELU or SwiGLU between them.

Legend: T = B * L rows, D width, F hidden width, H = F, or 2F for SwiGLU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from .arguments import (
    cast,
    check_mlp,
    check_policy,
    fake_gradients,
    gradients,
    product_dtype,
    rows,
    wanted_only,
)
from .compose import activation_ref, column_sum, hidden_grads
from .dispatch import FORCED, TABLE, choose, standard_backends
from .library import register

TABLE["mlp"] = standard_backends("cpu", "triton", "cuda", "torch", *FORCED)


def mlp_ref(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    return torch_linear(activation_ref(torch_linear(x, fc1_weight, fc1_bias), activation), fc2_weight, fc2_bias)


def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    policy: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = choose("mlp", x, backend, dtype)
    act, h = kernels.linear_activation(
        rows(x, dtype), fc1_weight.to(dtype), cast(fc1_bias, dtype), activation, policy != "inference"
    )
    out = kernels.linear(act, fc2_weight.to(dtype), cast(fc2_bias, dtype))
    return out.view(*x.shape[:-1], fc2_weight.shape[0]), h


def _fake_forward(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    *_, dtype, policy, _backend = rest
    h = x.new_empty((math.prod(x.shape[:-1]), fc1_weight.shape[0]) if policy != "inference" else (0,), dtype=dtype)
    return x.new_empty((*x.shape[:-1], fc2_weight.shape[0]), dtype=dtype), h


def _backward(
    d_out: Tensor,
    x: Tensor,
    h: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    dtype, d_TD = d_out.dtype, rows(d_out)
    kernels = choose("mlp", x, backend, dtype)
    fc1_HD, fc2_DF = fc1_weight.to(dtype), fc2_weight.to(dtype)
    d_x, act, d_fc1_weight, d_fc1_bias = hidden_grads(
        kernels, d_TD, fc2_DF, h, None, rows(x, dtype), fc1_HD, activation, (wanted[1], wanted[2])
    )
    grads = (
        d_x,
        d_fc1_weight,
        d_fc1_bias,
        kernels.weight_grad(d_TD, act) if wanted[3] else None,
        column_sum(d_TD) if wanted[4] else None,
    )
    return gradients(grads, (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias), wanted, d_out)


def _fake_backward(d_out: Tensor, x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, _activation, wanted, _backend = rest
    return fake_gradients((x, *parameters), wanted, d_out)


_mlp_backward = register(
    "mlp_backward(Tensor d_out, Tensor x, Tensor h, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, str activation, bool[] wanted, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *parameters, ctx.activation, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], *parameters)


def _autograd(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:5])
    grads = _mlp_backward(d_out, *ctx.saved_tensors, ctx.activation, wanted, ctx.backend)
    return *wanted_only(grads, wanted), None, None, None, None


_mlp = register(
    "mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str activation, "
    "ScalarType dtype, str policy, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """fc2(act(fc1(x))) (Vaswani et al. 2017, arXiv:1706.03762, eq. 2, with GELU, arXiv:1606.08415).

    Args:
        x: [..., D].
        fc1_weight, fc1_bias: [H, D] and [H] or None; H = F, or 2F for "swiglu", the gate's rows first.
        fc2_weight, fc2_bias: [D, F] and [D] or None.
        activation: "gelu" (erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x), as in CLIP, arXiv:2103.00020) or
            "swiglu" (silu(gate) * up, Shazeer 2020, arXiv:2002.05202, eq. 6).
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [..., D] in the weights' dtype, or autocast's. Keeps x and fc1's output for backward, not the activation's.

    Raises:
        ValueError: a shape does not fit, or the activation is unknown.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    check_mlp(activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, x.shape[-1])
    policy = check_policy("fused", x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    dtype = product_dtype(x, fc1_weight)
    return _mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, dtype, policy, backend)[0]
