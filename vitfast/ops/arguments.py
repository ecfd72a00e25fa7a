"""Checks and conventions that every op shares: dtypes under autocast, flat rows, recompute policies, optional gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What an op keeps for backward, most first. "inference" keeps nothing at all: no gradient is wanted.
POLICIES = ("none", "fused", "mlp")
POINTWISE = ("gelu", "gelu_tanh", "quick_gelu")  # as wide as what they are applied to
ACTIVATIONS = (*POINTWISE, "swiglu")  # "swiglu" halves the width: silu(first half) * second half


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype where it is on for the device of ``x``; the meta device, which it does not know, has none."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a matrix product with ``weight``: autocast's, else the weight's own."""
    return autocast_dtype(x) or weight.dtype


def check_policy(recompute: str, *tensors: Tensor | None) -> str:
    """Return ``recompute``, or "inference" where no gradient of ``tensors`` is wanted; ValueError for other words."""
    if recompute not in POLICIES:
        raise ValueError(f"recompute is {recompute!r}; an op takes {', '.join(map(repr, POLICIES))}")
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return recompute if wanted else "inference"


def check_activation(activation: str) -> None:
    """Raise ValueError unless ``activation`` is one the ops know."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}")


def activated_width(width: int, activation: str) -> int:
    """Columns of act(h) for h of ``width`` columns."""
    return width // 2 if activation == "swiglu" else width


def check_mlp(
    activation: str,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    inputs: int,
) -> None:
    """Raise ValueError unless the two layers fit each other, ``inputs`` and the activation between them."""
    check_activation(activation)
    check_linear("fc1_", fc1_weight, fc1_bias, inputs)
    if activation == "swiglu" and fc1_weight.shape[0] % 2:
        raise ValueError(f"fc1_weight has {fc1_weight.shape[0]} rows; swiglu needs an even number, gate and up")
    check_linear("fc2_", fc2_weight, fc2_bias, activated_width(fc1_weight.shape[0], activation))


def check_shape(name: str, x: Tensor | None, *allowed: Sequence[int]) -> None:
    """Raise ValueError unless ``x`` is None or has one of the allowed shapes."""
    if x is not None and not any(tuple(x.shape) == tuple(shape) for shape in allowed):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; allowed: {' or '.join(str(tuple(s)) for s in allowed)}")


def check_linear(name: str, weight: Tensor, bias: Tensor | None, inputs: int) -> None:
    """Raise ValueError unless ``weight`` is [O, inputs] and ``bias`` None or [O]; ``name`` is their prefix, as "fc1_"."""
    if weight.dim() != 2 or weight.shape[1] != inputs:
        raise ValueError(f"{name}weight has shape {tuple(weight.shape)}; allowed: (outputs, {inputs})")
    check_shape(f"{name}bias", bias, weight.shape[:1])


def check_drop_path(drop_path: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless ``drop_path`` is None or one factor for each sample of ``x`` [B, ..., D]."""
    check_shape("drop_path", drop_path, x.shape[:1])


def rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[..., D] as contiguous [T, D] rows, in ``dtype`` where given; a view where it already is so."""
    if x.dim() != 2 or not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1]).contiguous()
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` in ``dtype``, None for None."""
    return None if x is None else x.to(dtype)


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of means, variances and log-sum-exps: fp32, fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes of a LayerNorm's mean and rstd, one number for each row of x [..., D]."""
    mean = x.new_empty(math.prod(x.shape[:-1]), dtype=statistics_dtype(x))
    return mean, torch.empty_like(mean)


def nothing(like: Tensor) -> Tensor:
    """The empty tensor that ops return in place of a result that is not kept or not wanted."""
    return like.new_empty(0)


def gradients(
    grads: Sequence[Tensor | None], likes: Sequence[Tensor | None], wanted: Sequence[bool], fallback: Tensor
) -> tuple[Tensor, ...]:
    """What a backward op returns: each wanted gradient in its input's dtype and shape, an empty tensor for the others."""
    return tuple(
        _fitted(d, like) if want and d is not None and like is not None else nothing(fallback)
        for d, like, want in zip(grads, likes, wanted, strict=True)
    )


def _fitted(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype and shape of ``like``; asking first is cheaper than converting to what it is."""
    if x.dtype != like.dtype:
        x = x.to(like.dtype)
    return x if x.shape == like.shape else x.view(like.shape)


def fake_gradients(likes: Sequence[Tensor | None], wanted: Sequence[bool], fallback: Tensor) -> tuple[Tensor, ...]:
    """The shapes of :func:`gradients`."""
    return tuple(
        like.new_empty(like.shape) if want and like is not None else nothing(fallback)
        for like, want in zip(likes, wanted, strict=True)
    )


def wanted_only(results: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A backward op's results for autograd: None for each that was not wanted."""
    return tuple(r if want else None for r, want in zip(results, wanted, strict=True))
