"""From pixels to tokens: normalise, cut into patches, project, add positions, put the prefix tokens in front.

Legend: B images, C channels, P patch, N patches of an image, R prefix tokens (class and registers), D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import check_shape, fake_gradients, gradients, product_dtype, wanted_only
from .compose import column_sum
from .dispatch import FORCED, TABLE, choose, standard_backends
from .library import COMPOSITE, register

TABLE["patch_embed"] = standard_backends("cpu", "triton", "cuda", "torch", *FORCED)


def patch_embed_ref(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Plain PyTorch; the truth in fp64."""
    C = images.shape[1]
    x = images.to(weight.dtype) / 255 if images.dtype == torch.uint8 else images
    if mean is not None and std is not None:
        x = (x - x.new_tensor(mean).view(C, 1, 1)) / x.new_tensor(std).view(C, 1, 1)
    tokens = nn_functional.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    rest = None
    if pos_embed is not None and pos_embed.shape[-2] == tokens.shape[1]:
        tokens = tokens + pos_embed
    else:
        rest = pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.reshape(1, -1, tokens.shape[-1]).expand(tokens.shape[0], -1, -1), tokens], 1)
    return tokens if rest is None else tokens + rest


@functools.lru_cache(maxsize=64)
def _constants(scale: tuple[float, ...], shift: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The two pixel constants on ``device`` [C] in fp64-exact fp32; cached so that a call copies nothing to the GPU."""
    with torch.inference_mode(False):
        return torch.tensor(scale, device=device), torch.tensor(shift, device=device)


def _pixel_constants(
    scale: Sequence[float], shift: Sequence[float], like: Tensor, dtype: torch.dtype, backend: str
) -> Any:
    if dtype == torch.float64 or backend == COMPOSITE:  # a tracer's or a transform's constants must not outlive it
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.tensor(scale, dtype=kind, device=like.device), torch.tensor(shift, dtype=kind, device=like.device)
    return _constants(tuple(scale), tuple(shift), like.device)


def _forward(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    kernels = choose("patch_embed", weight, backend, dtype, out_dtype)
    constants = _pixel_constants(scale, shift, images, dtype, backend)
    return kernels.embed_patches(images, weight.to(dtype), bias, pos_embed, prefix, *constants, out_dtype)


def _fake_forward(images: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    _pos_embed, prefix, *_, out_dtype, _backend = rest
    B, _, height, width = images.shape
    R, P = 0 if prefix is None else prefix.shape[0], weight.shape[-1]
    return images.new_empty((B, R + (height // P) * (width // P), weight.shape[0]), dtype=out_dtype)


def _backward(
    d_tokens: Tensor,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    kernels = choose("patch_embed", weight, backend, dtype, d_tokens.dtype)
    P, R, D = weight.shape[-1], 0 if prefix is None else prefix.shape[0], weight.shape[0]
    constants = _pixel_constants(scale, shift, images, dtype, backend)
    d_projected = d_tokens[:, R:].reshape(-1, D).to(dtype)
    d_images = d_weight = None
    if wanted[0]:
        like = tuple(images.shape), images.dtype
        d_images = kernels.patches_image_grad(d_projected, weight.to(dtype), constants[0], *like, d_tokens)
    if wanted[1]:
        d_weight = kernels.patches_weight_grad(d_projected, images, P, *constants, d_tokens)
    d_positions = column_sum(d_tokens) if wanted[3] or wanted[4] else None  # [R + N, D]
    d_pos_embed = d_prefix = None
    if d_positions is not None and pos_embed is not None:
        d_pos_embed = d_positions[d_positions.shape[0] - pos_embed.shape[0] :]
    if d_positions is not None and prefix is not None:
        d_prefix = d_positions[:R].clone()
    grads = (d_images, d_weight, column_sum(d_projected) if wanted[2] else None, d_pos_embed, d_prefix)
    return gradients(grads, (images, weight, bias, pos_embed, prefix), wanted, d_tokens)


def _fake_backward(d_tokens: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, _scale, _shift, _dtype, wanted, _backend = rest
    return fake_gradients(inputs, wanted, d_tokens)


_patch_embed_backward = register(
    "patch_embed_backward(Tensor d_tokens, Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, "
    "Tensor? prefix, float[] scale, float[] shift, ScalarType dtype, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.shift, ctx.dtype, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, d_tokens: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    grads = _patch_embed_backward(
        d_tokens, *ctx.saved_tensors, list(ctx.scale), list(ctx.shift), ctx.dtype, wanted, ctx.backend
    )
    return *wanted_only(grads, wanted), None, None, None, None, None


_patch_embed = register(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, Tensor? pos_embed, Tensor? prefix, float[] scale, "
    "float[] shift, ScalarType dtype, ScalarType out_dtype, str backend) -> Tensor",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def _check(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> int:
    """Raise ValueError where shapes do not fit; return the number of patches of an image."""
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; allowed: (D, C, P, P)")
    D, C, P, _ = weight.shape
    if images.dim() != 4 or images.shape[1] != C:
        raise ValueError(f"images have shape {tuple(images.shape)}; allowed: (B, {C}, height, width)")
    height, width = images.shape[2:]
    if height % P or width % P:
        raise ValueError(f"images are {height} x {width} pixels; both must be multiples of the patch size {P}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; allowed: torch.uint8 or a float dtype")
    if (mean is None) != (std is None):
        raise ValueError("mean and std go together: one is given, the other is None")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != C:
            raise ValueError(f"{name} has {len(values)} values; images have {C} channels")
    check_shape("bias", bias, (D,))
    return (height // P) * (width // P)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cut images into patches and project each to a token (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1).

    Args:
        images: [B, C, height, width], uint8 or float, any strides; height and width multiples of P. uint8 pixels are
            scaled by 1/255 first.
        weight: [D, C, P, P], as a convolution's.
        bias: [D] or None.
        pos_embed: [1, N, D], added to the patches, or [1, R + N, D], added to the prefix tokens too; or None.
        prefix: class and register tokens, [R, D] or [1, R, D], or None.
        mean, std: of each channel, C numbers each: pixels become (x - mean) / std.
        backend: "auto", "cpu", "triton", "cuda" or "torch".

    Returns:
        [B, R + N, D], contiguous. The product is in the weight's dtype, or autocast's; the result in that dtype, or in the
        position embedding's or prefix's where it is wider. Keeps the images for backward, not the patches.

    Raises:
        ValueError: a shape, a dtype or the number of means does not fit.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    N, D = _check(images, weight, bias, mean, std), weight.shape[0]
    if prefix is not None:
        prefix = prefix.reshape(-1, D)
    if pos_embed is not None:
        R = 0 if prefix is None else prefix.shape[0]
        check_shape("pos_embed", pos_embed, (1, N, D), (1, R + N, D))
        pos_embed = pos_embed.squeeze(0)
    unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
    means, stds = mean or (0.0,) * images.shape[1], std or (1.0,) * images.shape[1]
    scale, shift = [unit / s for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]
    dtype = product_dtype(images, weight)
    out_dtype = dtype
    for added in (pos_embed, prefix):
        if added is not None:
            out_dtype = torch.promote_types(out_dtype, added.dtype)
    return _patch_embed(images, weight, bias, pos_embed, prefix, scale, shift, dtype, out_dtype, backend)
