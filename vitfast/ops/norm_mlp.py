"""LayerNorm, MLP and residual addition as one unit: neither the LayerNorm's nor the activation's output is kept for backward.

Legend: B samples, T = B * L rows, D width, F hidden width, H = F, or 2F for SwiGLU; ``X`` dtype of the residual stream, ``Y`` of the products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import (
    activated_width,
    cast,
    check_drop_path,
    check_mlp,
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
from .compose import (
    activation_ref,
    add_branch_ref,
    branch_grads,
    hidden_grads,
    project_weight_grads,
)
from .dispatch import FORCED, TABLE, choose, standard_backends, too_wide
from .library import register

TABLE["norm_mlp"] = standard_backends("cpu", "triton", "cuda", "torch", *FORCED)


def norm_mlp_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    normed = nn_functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    hidden = nn_functional.linear(normed, fc1_weight, fc1_bias)
    branch = nn_functional.linear(activation_ref(hidden, activation), fc2_weight, fc2_bias)
    return add_branch_ref(x, branch, scale, drop_path)


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    eps: float,
    activation: str,
    dtype: torch.dtype,
    policy: str,
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("norm_mlp", x, backend, dtype, why_not=too_wide(x))
    x_TD = rows(x)
    fc1, fc2 = (fc1_weight.to(dtype), cast(fc1_bias, dtype)), (fc2_weight.to(dtype), cast(fc2_bias, dtype))
    if policy == "inference" and drop_path is None:
        out = kernels.norm_mlp(x_TD, norm_weight, norm_bias, eps, *fc1, activation, *fc2, scale)
        return out.view(x.shape), *_nothing_kept(x)
    _, normed, mean, rstd = kernels.layer_norm_forward(x_TD, None, None, None, norm_weight, norm_bias, eps, dtype)
    keep = policy != "inference"  # also for "mlp": the activation must see the rounded sum, as it will in backward
    act, h = kernels.linear_activation(normed, *fc1, activation, keep)
    out = kernels.linear_residual(x_TD, act, *fc2, scale, drop_path)
    if policy == "inference":
        return out.view(x.shape), *_nothing_kept(x)
    return (
        out.view(x.shape),
        mean,
        rstd,
        h if policy in ("none", "fused") else nothing(h),
        normed if policy == "none" else nothing(normed),
        act if policy == "none" else nothing(act),
    )


def _nothing_kept(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(nothing(x) for _ in range(5))


def _fake_forward(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, fc1_weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, activation, dtype, policy, _backend = rest
    T, D, H = math.prod(x.shape[:-1]), x.shape[-1], fc1_weight.shape[0]
    F = activated_width(H, activation)
    if policy == "inference":
        return x.new_empty(x.shape), *_nothing_kept(x)
    return (
        x.new_empty(x.shape),
        *fake_statistics(x),
        x.new_empty((T, H) if policy in ("none", "fused") else (0,), dtype=dtype),
        x.new_empty((T, D) if policy == "none" else (0,), dtype=dtype),
        x.new_empty((T, F) if policy == "none" else (0,), dtype=dtype),
    )


def _backward(
    d_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    normed: Tensor,
    act: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale: Tensor | None,
    drop_path: Tensor | None,
    activation: str,
    dtype: torch.dtype,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("norm_mlp", x, backend, dtype, why_not=too_wide(x))
    x_TD, d_TD = rows(x), rows(d_out)
    fc1_HD, fc2_DF = fc1_weight.to(dtype), fc2_weight.to(dtype)
    if normed.numel() == 0:
        normed = kernels.layer_norm_apply(x_TD, mean, rstd, norm_weight, norm_bias, dtype)
    if h.numel() == 0:
        h, again = kernels.linear_again(normed, fc1_HD, cast(fc1_bias, dtype), activation)
        act = nothing(h) if again is None else again
    dropped, branch = branch_grads(d_TD, scale, drop_path, dtype)
    d_normed, act_TF, d_fc1_weight, d_fc1_bias = hidden_grads(
        kernels,
        branch,
        fc2_DF,
        h,
        act if act.numel() else None,
        normed,
        fc1_HD,
        activation,
        (wanted[3], wanted[4]),
    )
    d_fc2_weight, d_fc2_bias, d_scale = project_weight_grads(
        kernels, dropped, branch, act_TF, fc2_DF, fc2_bias, scale, (wanted[5], wanted[6], wanted[7])
    )
    d_x, _, _, d_norm_weight, d_norm_bias = kernels.layer_norm_backward(d_normed, d_TD, x_TD, mean, rstd, norm_weight)
    grads = (d_x, d_norm_weight, d_norm_bias, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias, d_scale)
    likes = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale)
    return gradients(grads, likes, wanted, d_out)


def _fake_backward(
    d_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    h: Tensor,
    normed: Tensor,
    act: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *parameters, _drop_path, _activation, _dtype, wanted, _backend = rest
    return fake_gradients((x, *parameters), wanted, d_out)


_norm_mlp_backward = register(
    "norm_mlp_backward(Tensor d_out, Tensor x, Tensor mean, Tensor rstd, Tensor h, Tensor normed, Tensor act, "
    "Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "Tensor? scale, Tensor? drop_path, str activation, ScalarType dtype, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *parameters, _, ctx.activation, ctx.dtype, _, ctx.backend = inputs  # parameters: norm ... scale, drop_path
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *kept, *parameters)


def _autograd(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 14
    wanted = list(ctx.needs_input_grad[:8])
    grads = _norm_mlp_backward(d_out, *ctx.saved_tensors, ctx.activation, ctx.dtype, wanted, ctx.backend)
    return *wanted_only(grads, wanted), None, None, None, None, None, None


_norm_mlp = register(
    "norm_mlp(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias, Tensor? scale, Tensor? drop_path, float eps, str activation, ScalarType dtype, str policy, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def norm_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    activation: str = "gelu",
    scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    recompute: str = "fused",
    backend: str = "auto",
) -> Tensor:
    """x + drop_path * scale * mlp(layer_norm(x)): the second half of a pre-norm block.

    Args:
        x: [B, ..., D] in X.
        norm_weight, norm_bias: [D].
        fc1_weight, fc1_bias: [H, D] and [H] or None; H = F, or 2F for "swiglu", the gate's rows first.
        fc2_weight, fc2_bias: [D, F] and [D] or None.
        eps: added to the variance.
        activation: "gelu" (erf), "gelu_tanh", "quick_gelu" (x * sigmoid(1.702 x), as in CLIP, arXiv:2103.00020) or
            "swiglu" (silu(gate) * up, Shazeer 2020, arXiv:2002.05202, eq. 6).
        scale: LayerScale's factor [D] (arXiv:2103.17239, eq. 4), or None.
        drop_path: one factor for each sample [B], mask / keep probability (arXiv:1603.09382), or None; no gradient.
        recompute: what backward makes again instead of keeping it: "none" nothing; "fused" the LayerNorm and activation outputs;
            "mlp" also fc1's product. Gradients are the same bits under each.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [B, ..., D] in X; products are in the weights' dtype, or autocast's.

    Raises:
        ValueError: a shape does not fit, or ``activation`` or ``recompute`` is another word.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("scale", scale)):
        check_shape(name, parameter, x.shape[-1:])
    check_mlp(activation, fc1_weight, fc1_bias, fc2_weight, fc2_bias, x.shape[-1])
    check_shape("fc2_weight", fc2_weight, (x.shape[-1], fc2_weight.shape[1]))
    check_drop_path(drop_path, x)
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale)
    policy = check_policy(recompute, x, *parameters)
    return _norm_mlp(x, *parameters, drop_path, eps, activation, product_dtype(x, fc1_weight), policy, backend)[0]
