"""The transformer's MLP, alone and as the unit LayerNorm + MLP + residual. B images, L tokens, D width, F hidden width."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vitfast.ops.mlp import mlp, mlp_ref
from vitfast.ops.norm_mlp import norm_mlp, norm_mlp_ref

from .gpu_peers import norm_mlp_peers
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import own_providers, plain_providers
from .presets import along, distinct

OPS = ("mlp", "norm_mlp")
PEERS = ("transformer_engine",)
EPS = 1e-6  # norm_mlp's own default
DEFAULTS: dict[str, int | str] = {"B": 8, "L": 197, "D": 384, "F": 1536}
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"B": 4}],
    "overview cuda": [{"B": 64, "D": 768, "F": 3072}],
    "cpu": [{}, {"B": 4, "D": 768, "F": 3072}],
    "cuda": [{"B": 128}, {"B": 128, "D": 768, "F": 3072}, {"B": 64, "L": 257, "D": 1280, "F": 5120}],
    "growth": distinct(
        along("D", (64, 192, 384, 768, 1024), {"B": 2, "L": 197}, F=4),
        along("B", (1, 4, 16), {"L": 197, "D": 192, "F": 768}),
    ),
    "growth cuda": distinct(
        along("D", (192, 384, 768, 1024, 1280, 1664), {"B": 64, "L": 197}, F=4),
        along("B", (1, 4, 16, 64, 256, 512), {"L": 197, "D": 768, "F": 3072}),
    ),
    "dry": [{"B": 1, "L": 3, "D": 32, "F": 64}],
}


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    B, L, D, F = (int(shape[axis]) for axis in "BLDF")
    kind, unit = TORCH_DTYPE[dtype], op == "norm_mlp"
    T, element = B * L, kind.itemsize
    weights = 2 * D * F * element
    # two products forward, four backward. With a graph, fc1's output is written once and read once.
    forward = Work(2 * T * D * element + weights, 4 * T * D * F)
    kept = Work(forward.bytes + T * F * element, forward.flops)
    backward = Work((3 * T * D + T * F) * element + 2 * weights, 8 * T * D * F)
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, B, L, D, F, kind, device, unit),
        grads=(
            *(("norm_weight", "norm_bias") if unit else ()),
            "x",
            "fc1_weight",
            "fc1_bias",
            "fc2_weight",
            "fc2_bias",
        ),
        reference=norm_mlp_ref if unit else mlp_ref,
        providers=functools.partial(_providers, op, D, F, kind, device),
        work={"forward": [forward], "backward": [backward], "both": [kept, backward]},
    )


def _inputs(B: int, L: int, D: int, F: int, dtype: torch.dtype, device: str, unit: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std + mean).to(device, dtype)

    norm = {"norm_weight": random(D, std=0.1, mean=1.0), "norm_bias": random(D, std=0.1)} if unit else {}
    products = {
        "fc1_weight": random(F, D, std=D**-0.5),
        "fc1_bias": random(F, std=0.1),
        "fc2_weight": random(D, F, std=F**-0.5),
        "fc2_bias": random(D, std=0.1),
    }
    return {"x": random(B, L, D), **norm, **products}


def _providers(op: str, D: int, F: int, dtype: torch.dtype, device: str) -> list[Provider]:
    run, reference = (norm_mlp, norm_mlp_ref) if op == "norm_mlp" else (mlp, mlp_ref)
    found = own_providers(op, run, device, dtype) + plain_providers(reference)
    if device == "cuda" and op == "norm_mlp" and dtype != torch.float32:
        found += norm_mlp_peers(D, F, EPS, dtype)
    return found
