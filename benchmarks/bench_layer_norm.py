"""LayerNorm, alone and fused with the residual addition before it. B images, L tokens, D width."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfast.ops.layer_norm import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref

from .gpu_peers import layer_norm_peers
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import own_providers, plain_providers
from .presets import along, distinct

OPS = ("layer_norm", "add_layer_norm")
PEERS = ("liger_kernel", "quack", "transformer_engine")
_WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
DEFAULTS: dict[str, int | str] = {"B": 8, "L": 197, "D": 768}
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{}],
    "overview cuda": [{"B": 128}],
    "cpu": [{"D": 384}, {}, {"B": 4, "L": 257, "D": 1280}],
    "cuda": [{"B": 256, "D": 384}, {"B": 256}, {"B": 64, "L": 257, "D": 1280}, {"B": 1}],
    "growth": distinct(
        along("D", _WIDTHS[::2] + _WIDTHS[-1:], {"B": 4, "L": 197}),
        along("L", (64, 197, 1025, 4097), {"B": 4, "D": 384}),
        along("B", (1, 4, 16, 64), {"L": 197, "D": 384}),
    ),
    "growth cuda": distinct(
        along("D", _WIDTHS, {"B": 64, "L": 197}),
        along("L", (64, 197, 577, 1025, 4097), {"B": 64, "D": 768}),
        along("B", (1, 4, 16, 64, 256, 512), {"L": 197, "D": 768}),
    ),
    "dry": [{"B": 2, "L": 3, "D": 64}],
}
EPS = 1e-6


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    B, L, D = (int(shape[axis]) for axis in "BLD")
    kind, fused = TORCH_DTYPE[dtype], op == "add_layer_norm"
    tokens, parameters = B * L * D * kind.itemsize, 2 * D * kind.itemsize
    # alone: x in, y out; d_y and x in, d_x out. Fused: residual and branch in, sum and norm out; both their gradients
    # and the sum in, one gradient out that serves residual and branch.
    forward = Work((4 if fused else 2) * tokens + parameters, (9 if fused else 8) * B * L * D)
    backward = Work((4 if fused else 3) * tokens + 2 * parameters, 14 * B * L * D)
    reference = _add_plain if fused else _plain
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, B, L, D, kind, device, fused),
        grads=("residual", "branch", "weight", "bias") if fused else ("x", "weight", "bias"),
        reference=reference,
        providers=functools.partial(_providers, op, D, kind, device),
        work={"forward": [forward], "backward": [backward], "both": [forward, backward]},
    )


def _inputs(B: int, L: int, D: int, dtype: torch.dtype, device: str, fused: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) + mean).to(device, dtype)

    parameters: dict[str, Tensor | None] = {"weight": random(D, mean=1.0), "bias": random(D)}
    if fused:
        return {"residual": random(B, L, D), "branch": random(B, L, D)} | parameters
    return {"x": random(B, L, D)} | parameters


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm_ref(x, weight, bias, EPS)


def _add_plain(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return add_layer_norm_ref(residual, branch, weight, bias, EPS)


def _ours(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return layer_norm(x, weight, bias, EPS, backend=backend)


def _add_ours(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return add_layer_norm(residual, branch, weight, bias, EPS, backend=backend)


def _providers(op: str, D: int, dtype: torch.dtype, device: str) -> list[Provider]:
    fused = op == "add_layer_norm"
    found = own_providers("layer_norm", _add_ours if fused else _ours, device, dtype)
    found += plain_providers(_add_plain if fused else _plain)
    if device == "cuda" and not fused:
        found += layer_norm_peers(D, EPS, dtype)
    return found
