"""The places and search spaces of LayerNorm with what surrounds it: tiles of whole rows, forward and backward.

The three forward kernels (with a branch, from saved statistics, without a norm) share a row, and are timed together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from . import layer_norm
from .configs import RowConfig, next_power_of_two
from .tile_rows import KERNELS
from .tune_tiles import Place, candidates
from .tune_trial import Run, Setting

WIDTHS = ((384,), (768, 1024), (1280,))  # the widths of one row have one power of two above them
DRY_WIDTHS = ((24,),)


def tensors(D: int, branch: torch.dtype, stream: torch.dtype, setting: Setting) -> dict[str, Any]:
    generator = torch.Generator(setting.on).manual_seed(0)

    def random(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=setting.on).to(kind)

    B, L = (2, 5) if setting.dry else (64, 197)
    return {
        "x": random(B * L, D, kind=stream),
        "branch": random(B * L, D, kind=branch),
        "vectors": (random(D), random(D), random(D)),
        "drop_path": random(B),
        "statistics": (random(B * L), random(B * L)),
    }


def forward_run(*shape: Any) -> Run:
    x, branch, (scale, weight, bias), drop_path, (mean, rstd) = tensors(*shape).values()
    total, normed, again, added = torch.empty_like(x), torch.empty_like(branch), torch.empty_like(branch), x.clone()

    def launch() -> None:
        layer_norm.layer_norm_forward(x, branch, scale, drop_path, weight, bias, 1e-6, total, normed, mean, rstd)
        layer_norm.layer_norm_apply(total, mean, rstd, weight, bias, again)
        layer_norm.scale_add_forward(x, branch, scale, drop_path, added)

    return Run(launch, [total, normed, mean, rstd, again, added])


def backward_run(*shape: Any, everything: bool = False) -> Run:
    """A block's norm alone, or with a branch, LayerScale and DropPath before it."""
    x, branch, (scale, weight, _bias), drop_path, (mean, rstd) = tensors(*shape).values()
    d_x, d_normed, d_total = torch.empty_like(x), branch.flip(0), x.flip(0)
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    given, outputs = (None, None, None), [d_x, d_weight, d_bias]
    d_branch = d_scale = None
    if everything:
        given, d_branch, d_scale = (branch, scale, drop_path), torch.empty_like(branch), torch.empty_like(scale)
        outputs += [d_branch, d_scale]
    arguments = (d_normed, d_total, x, mean, rstd, weight, *given, d_x, d_branch, d_scale, d_weight, d_bias)
    return Run(partial(layer_norm.layer_norm_backward, *arguments), outputs)


def space(rule: RowConfig, backward: bool) -> Iterator[RowConfig]:
    """4 to 64 elements per thread forward, to 16 backward, whose three column sums are that many registers each."""
    for rows in (1, 2, 4, 8):
        for warps in (1, 2, 4, 8, 16):
            for programs in (2, 4, 5, 8) if backward else (0,):
                if 4 <= rows * rule.width // (32 * warps) <= (16 if backward else 64) and warps * programs <= 32:
                    yield replace(rule, rows=rows, warps=warps, programs=programs)


def places(kernel: str, dtype: torch.dtype, _precision: str, setting: Setting) -> Iterator[Place]:
    """Of layer_norm, dtype that of the stream, or of layer_norm_backward, dtype that of the normalised output. Under autocast
    the stream is fp32 and all else bf16."""
    backward = kernel == "layer_norm_backward"
    run = backward_run if backward else forward_run
    kinds = {(dtype, dtype)}  # of branch and stream
    if backward:
        kinds.add((dtype, torch.float32))
    elif dtype == torch.float32:
        kinds.add((torch.bfloat16, dtype))
    for widths in DRY_WIDTHS if setting.dry else WIDTHS:
        most = next_power_of_two(widths[0])
        rule = KERNELS[kernel].rule(widths[0], dtype, setting.arch)
        where = {"arch": setting.arch, "dtype": str(dtype).removeprefix("torch."), "columns": (most // 2 + 1, most)}
        timed = {
            f"width {D}, {str(b).removeprefix('torch.')} branch, {str(s).removeprefix('torch.')} stream": (
                D,
                b,
                s,
                setting,
            )
            for D in widths
            for b, s in sorted(kinds, key=str)
        }
        yield Place(
            kernel, where, {name: partial(run, *shape) for name, shape in timed.items()},
            tuple(partial(backward_run, *shape, everything=True) for shape in timed.values()) if backward else (),
            candidates(space(rule, backward), rule, setting), compile_seconds=0.9 if not backward else 0.4,
        )  # fmt: skip
