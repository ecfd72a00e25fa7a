"""From pixels to tokens. B images of S x S pixels in three channels, P patch, D width; with positions and a class token.

``patch_embed_uint8`` starts from the bytes of a decoded image and normalises, ``patch_embed`` from normalised floats.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitfast.ops.patch_embed import patch_embed, patch_embed_ref

from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import own_providers, plain_providers
from .presets import along, distinct

OPS = ("patch_embed", "patch_embed_uint8")
PEERS: tuple[str, ...] = ()
DEFAULTS: dict[str, int | str] = {"B": 8, "S": 224, "P": 16, "D": 768}
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{}],
    "overview cuda": [{"B": 128}],
    "cpu": [{}, {"B": 4, "P": 14, "D": 1024}],
    "cuda": [{"B": 256}, {"B": 64, "P": 14, "D": 1280}, {"B": 1}],
    "growth": distinct(
        along("S", (224, 384, 512, 1024), {"B": 1, "P": 16, "D": 384}),
        along("B", (1, 4, 32), {"S": 224, "P": 16, "D": 384}),
        along("D", (192, 384, 768, 1280), {"B": 4, "S": 224, "P": 16}),
    ),
    "growth cuda": distinct(
        along("S", (224, 384, 512, 768, 1024), {"B": 16, "P": 16, "D": 768}),
        along("B", (1, 4, 16, 64, 256, 512), {"S": 224, "P": 16, "D": 768}),
        along("D", (192, 384, 768, 1280), {"B": 64, "S": 224, "P": 16}),
    ),
    "dry": [{"B": 1, "S": 8, "P": 4, "D": 32}],
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CHANNELS = 3


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    B, S, P, D = (int(shape[axis]) for axis in "BSPD")
    kind, raw = TORCH_DTYPE[dtype], op == "patch_embed_uint8"
    N, K = (S // P) ** 2, _CHANNELS * P * P
    pixels = B * _CHANNELS * S * S * (1 if raw else kind.itemsize)
    tokens, parameters = B * (N + 1) * D * kind.itemsize, (K * D + D + (N + 1) * D + D) * kind.itemsize
    # the images get no gradient: backward reads their pixels and the tokens' gradient, and writes the parameters'
    forward = Work(pixels + tokens + parameters, 2 * B * N * K * D)
    backward = Work(pixels + tokens + parameters, 2 * B * N * K * D)
    constants: dict[str, Any] = {"mean": MEAN, "std": STD} if raw else {}
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, B, S, P, D, kind, device, raw),
        grads=("weight", "bias", "pos_embed", "prefix"),
        reference=functools.partial(patch_embed_ref, **constants),
        providers=functools.partial(_providers, kind, device, constants),
        work={"forward": [forward], "backward": [backward], "both": [forward, backward]},
    )


def _inputs(B: int, S: int, P: int, D: int, dtype: torch.dtype, device: str, raw: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, dtype)

    images = torch.randint(0, 256, (B, _CHANNELS, S, S), dtype=torch.uint8, generator=generator).to(device)
    return {
        "images": images if raw else random(B, _CHANNELS, S, S),
        "weight": random(D, _CHANNELS, P, P, std=(_CHANNELS * P * P) ** -0.5),
        "bias": random(D, std=0.1),
        "pos_embed": random(1, (S // P) ** 2 + 1, D, std=0.1),
        "prefix": random(1, 1, D),
    }


def _providers(dtype: torch.dtype, device: str, constants: dict[str, Any]) -> list[Provider]:
    ours: Callable[..., Tensor] = functools.partial(patch_embed, **constants)
    plain: Callable[..., Tensor] = functools.partial(patch_embed_ref, **constants)
    return own_providers("patch_embed", ours, device, dtype) + plain_providers(plain)
