"""What the tests of vitfast inside PyTorch share: small models next to the plain ones that they are held to."""

from __future__ import annotations

from typing import Any

import accelerate_checks
import model_checks
import pytest
import torch
from torch import Tensor, nn

KINDS = ("ours", "timm", "transformers")  # a model of create_model; accelerated models of two libraries
# For what takes seconds for each: compilers and exporters. The quick run has our own model.
OURS_FIRST = (KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]))
_OURS = "deit3_small_patch16_224"  # LayerScale, positions on patches only
_ACCELERATED = {"timm": accelerate_checks.DINOV3, "transformers": accelerate_checks.HF}


class Logits(nn.Module):
    """A model of transformers as one that takes images and returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def pair(kind: str = "ours") -> tuple[Any, Any]:
    """(the model on our ops, the same in plain PyTorch), both in eval mode and fp32; the same weights in every process."""
    if kind == "ours":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            plain, model = model_checks.pair(_OURS, **model_checks.small(_OURS))
        return model.eval(), plain.eval()
    plain, model, _ = accelerate_checks.pair(_ACCELERATED[kind])
    return (Logits(model), Logits(plain)) if kind == "transformers" else (model, plain)


def images(batch: int = 2, seed: int = 2) -> Tensor:
    """[batch, 3, 64, 64], for every model of ``pair``."""
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, x: Tensor, call: Any = None) -> dict[str, Tensor]:
    """The output and every gradient of one training step; ``call`` stands in for calling the model."""
    model.zero_grad()
    out = (model if call is None else call)(x)
    out.float().square().mean().backward()
    return {"": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


assert_same_step = accelerate_checks.assert_same_step
rel = model_checks.rel
