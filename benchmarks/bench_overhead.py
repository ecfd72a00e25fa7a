"""What a call costs before any work: each op on tensors so small that only dispatch is left, beside plain PyTorch's.

Microseconds matter where a model is small or the batch is one. The clock stops when the host is free again.
"""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType

from . import bench_attention, bench_layer_norm, bench_mlp, bench_patch_embed
from .harness import Case, Provider

_MODULES: dict[str, ModuleType] = {
    op: module for module in (bench_layer_norm, bench_attention, bench_mlp, bench_patch_embed) for op in module.OPS
}
OPS = ("overhead",)
PEERS: tuple[str, ...] = ()
DEFAULTS: dict[str, int | str] = {"call": "layer_norm"}
_ALL: list[dict[str, int | str]] = [{"call": op} for op in _MODULES]
_FEW: list[dict[str, int | str]] = [{"call": op} for op in ("layer_norm", "attention")]
SHAPES = {
    "overview cpu": _FEW,
    "overview cuda": _FEW,
    "cpu": _ALL,
    "cuda": _ALL,
    "growth": _ALL,
    "growth cuda": _ALL,
    "dry": _FEW,
}


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    called = str(shape["call"])
    if called not in _MODULES:
        raise ValueError(f"call is {called!r}; allowed: {', '.join(_MODULES)}")
    module = _MODULES[called]
    small = module.case(called, module.DEFAULTS | module.SHAPES["dry"][0], dtype, device)
    work = {direction: small.work[direction] for direction in ("forward", "both")}
    providers = functools.partial(_few, small)
    return dataclasses.replace(small, op=op, shape=shape, work=work, providers=providers, hot=True, timing="queue")


def _few(small: Case) -> list[Provider]:
    """The backend that "auto" takes, and plain PyTorch."""
    everyone = small.providers()
    ours = next(provider for provider in everyone if provider.ours and not provider.slow)
    return [ours, *(provider for provider in everyone if provider.name in ("pytorch eager", "sdpa"))]
