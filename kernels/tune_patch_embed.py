"""The places and search spaces of patch embedding: its product, the weight's and the images' gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from . import patch_embed
from .configs import ProductConfig
from .tile_rows import KERNELS
from .tune_tiles import Place, candidates
from .tune_trial import Run, Setting

# Ranges of widths, and the width that each is timed at.
WIDTHS: dict[tuple[int, int | None], int] = {(1, 512): 384, (513, 1024): 768, (1025, None): 1280}
PATCHES = (14, 16)
DRY_WIDTHS: dict[tuple[int, int | None], int] = {(1, 512): 24}
DRY_PATCHES = (4,)


def tensors(P: int, D: int, pixels: torch.dtype, last: bool, dtype: torch.dtype, setting: Setting) -> dict[str, Any]:
    """last: channels last. Images of 224 pixels with a class token."""
    generator = torch.Generator(setting.on).manual_seed(0)

    def random(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=setting.on).to(kind)

    B, size = (2, 3 * P) if setting.dry else (64, 224)
    images = (random(B, 3, size, size) * 50 + 128).clamp(0, 255).to(pixels)
    N = (size // P) ** 2
    return {
        "images": images.to(memory_format=torch.channels_last) if last else images,
        "weight": random(D, 3, P, P, kind=dtype) * (3 * P * P) ** -0.5,
        "channel": random(3) / 255,
        "vectors": (random(D), random(1 + N, D), random(1, D)),
        "tokens": random(B, 1 + N, D, kind=dtype),
    }


def forward_run(*shape: Any) -> Run:
    images, weight, channel, vectors, tokens = tensors(*shape).values()
    arguments = (images, weight, *vectors, channel, channel, tokens)
    return Run(partial(patch_embed.patch_embed_forward, *arguments), [tokens])


def weight_run(*shape: Any) -> Run:
    images, weight, channel, _vectors, tokens = tensors(*shape).values()
    d_weight = torch.empty(weight.shape, device=weight.device)
    arguments = (images, tokens, channel, channel, weight.dtype, d_weight)
    return Run(partial(patch_embed.patch_embed_weight_gradient, *arguments), [d_weight])


def image_run(*shape: Any) -> Run:
    images, weight, channel, _vectors, tokens = tensors(*shape).values()
    d_images = torch.empty(images.shape, device=images.device)
    arguments = (tokens, weight, channel, d_images)
    return Run(partial(patch_embed.patch_embed_image_gradient, *arguments), [d_images])


RUNS: dict[str, Callable[..., Run]] = {"patch_embed": forward_run, "patch_weight": weight_run, "patch_image": image_run}


def space(dtype: torch.dtype) -> Iterator[ProductConfig]:
    """Sums of at most 128 fp32 per thread; the pixels' tile passes through registers besides."""
    if dtype == torch.float32:
        tiles = [(32, 32, 4), (64, 32, 4), (64, 64, 4), (128, 32, 4), (128, 64, 8)]
        steps = [(16, 2), (32, 2)]
    else:
        tiles = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (64, 128, 8), (128, 128, 8), (64, 256, 8), (128, 256, 8)]
        steps = [(32, 3), (32, 4), (64, 2), (64, 3)]
    for rows, columns, warps in tiles:
        for depth, stages in steps:
            yield ProductConfig(rows, columns, depth, warps, stages)


def sides(kernel: str, width: Any, pixels: Any) -> dict[str, Any]:
    """What configs.py calls the width of the model and the pixels of a patch, in the order of the function's arguments."""
    if kernel == "patch_embed":
        return {"columns": width, "depth": pixels}
    return {"rows": width, "columns": pixels} if kernel == "patch_weight" else {"columns": pixels, "depth": width}


def places(kernel: str, dtype: torch.dtype, precision: str, setting: Setting) -> Iterator[Place]:
    """Of patch_embed, patch_weight or patch_image."""
    run, name = RUNS[kernel], str(dtype).removeprefix("torch.")
    every = {"uint8": torch.uint8, "float32": torch.float32}
    groups: list[tuple[dict[str, bool], dict[str, torch.dtype]]] = [({}, every)]
    if kernel == "patch_image":
        groups = [({}, {"float32": torch.float32})]  # others have no gradient
    elif kernel == "patch_weight":
        groups = [({"wide_pixels": kind == torch.float32}, {label: kind}) for label, kind in every.items()]
    sizes = itertools.product((DRY_WIDTHS if setting.dry else WIDTHS).items(), DRY_PATCHES if setting.dry else PATCHES)
    for (between, D), P in sizes:
        K = 3 * P * P
        for more, images in groups:
            fixed = {"dtype": name, "precision": precision, "arch": setting.arch}
            where = {**sides(kernel, between, (K, K)), **more, **fixed}
            shape = (*sides(kernel, D, K).values(), *more.values())
            rule = KERNELS[kernel].rule(*shape, dtype, precision, setting.arch)
            heavy = more.get("wide_pixels", True)
            yield Place(
                kernel,
                where,
                {
                    f"patch {P}, width {D}, {pixels}": partial(run, P, D, kind, False, dtype, setting)
                    for pixels, kind in images.items()
                },
                # masked columns
                (partial(run, P, D + 8, torch.float32 if heavy else torch.uint8, True, dtype, setting),),
                candidates(space(dtype), rule, setting),
                compile_seconds=1.0,
            )
