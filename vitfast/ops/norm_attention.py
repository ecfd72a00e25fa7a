"""The attention half of a pre-norm block in one call, for inference; training has an op for each of its parts.

Legend: B images, L tokens, D width, C = 3 * H * E, H heads, E head dim; ``X`` dtype of the residual stream, ``Y`` of the
products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import cast, check_linear, check_shape, product_dtype
from .dispatch import TABLE, choose, standard_backends
from .library import register

TABLE["norm_attention"] = standard_backends("cpu", "triton", "torch")


def norm_attention_ref(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    attention_scale: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    normed = nn_functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    qkv = nn_functional.linear(normed, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, E] each
    factor = q.shape[-1] ** -0.5 if attention_scale is None else attention_scale
    out = ((q @ k.transpose(-2, -1) * factor).softmax(-1) @ v).transpose(1, 2).flatten(2)
    branch = nn_functional.linear(out, proj_weight, proj_bias)
    return x + (branch if scale is None else branch * scale)


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    scale: Tensor | None,
    num_heads: int,
    attention_scale: float,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kernels = choose("norm_attention", x, backend, dtype)
    return kernels.norm_attention(
        x.contiguous(),
        norm_weight,
        norm_bias,
        eps,
        qkv_weight.to(dtype),
        cast(qkv_bias, dtype),
        num_heads,
        attention_scale,
        proj_weight.to(dtype),
        cast(proj_bias, dtype),
        scale,
    )


def _fake_forward(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_norm_attention = register(
    "norm_attention(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? scale, int num_heads, float attention_scale, float eps, "
    "ScalarType dtype, str backend) -> Tensor",
    _forward,
    _fake_forward,
)


def norm_attention(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
    *,
    attention_scale: float | None = None,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x + scale * proj(attention(qkv(layer_norm(x)))): the first half of a pre-norm block, for inference only.

    Args:
        x: [B, L, D] in X.
        norm_weight, norm_bias: [D].
        qkv_weight, qkv_bias: [3 * H * E, D] and [3 * H * E] or None, packed as q, k, v.
        proj_weight, proj_bias: [D, H * E] and [D] or None.
        num_heads: H.
        eps: added to the variance.
        attention_scale: of the logits; default E ** -0.5.
        scale: LayerScale's factor [D] (arXiv:2103.17239, eq. 4), or None.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [B, L, D] in X; products are in the weights' dtype, or autocast's.

    Raises:
        ValueError: a shape does not fit.
        RuntimeError: a gradient is wanted, which ``norm_linear``, ``attention`` and ``linear_residual`` have; or the named
            backend cannot run.
    """
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (B, L, D)")
    D, C = x.shape[-1], qkv_weight.shape[0]
    if num_heads < 1 or C % (3 * num_heads):
        raise ValueError(f"num_heads is {num_heads}; 3 * num_heads must divide the {C} rows of qkv_weight")
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("scale", scale)):
        check_shape(name, parameter, (D,))
    check_linear("qkv_", qkv_weight, qkv_bias, D)
    check_shape("proj_weight", proj_weight, (D, C // 3))
    check_shape("proj_bias", proj_bias, (D,))
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        raise RuntimeError("norm_attention has no gradient: use norm_linear, attention and linear_residual, or no_grad")
    factor = (C // (3 * num_heads)) ** -0.5 if attention_scale is None else attention_scale
    return _norm_attention(x, *parameters, num_heads, factor, eps, product_dtype(x, qkv_weight), backend)
