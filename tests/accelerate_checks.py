"""What the tests of ``vitfast.accelerate`` share: two equal models, and which of our ops a call ran."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast.benchmarks.architectures import build

FP32 = 1e-5  # the project's bar for fp32 parity
# One architecture of each kind, by the names of vitfast.benchmarks.architectures
VIT = "timm/deit3_base_patch16_224"  # class token, LayerScale
DINOV3 = "timm/vit_small_patch16_dinov3"  # rotary positions, registers
TORCHVISION = "torchvision/vit_b_16"
HF = "google/vit-base-patch16-224"
HF_DINOV3 = "facebook/dinov3-vits16-pretrain-lvd1689m"
ONE_EACH = [VIT, DINOV3, TORCHVISION, HF, HF_DINOV3]


class Calls(TorchDispatchMode):
    """Counts calls of our ops: ``calls["attention"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "vitfast":
            self.counts[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.counts[name]


def pair(name: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """(original, the same accelerated, inputs) of a small architecture; both in eval mode."""
    original, inputs = build(name, small=True)
    return original, vitfast.accelerate(copy.deepcopy(original), **options), inputs


def first(result: Any) -> Tensor:
    """The first tensor of a model's result."""
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, Mapping) else result
    return next(t for t in values if isinstance(t, Tensor) and t.dim() > 0)


def run(model: nn.Module, inputs: dict[str, Tensor], seed: int = 0, **more: Any) -> Tensor:
    """The first output, from a fixed random state."""
    torch.manual_seed(seed)
    return first(model(**inputs, **more))


def step(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """The first output and every gradient of one step."""
    model.zero_grad()
    out = run(model, inputs, **more)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)).sum().backward()
    return {"": out.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_same_step(ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float = FP32) -> None:
    """Output and every gradient within ``allowed``; gradients that are zero in theory against a typical one."""
    assert ours.keys() == theirs.keys()
    typical = torch.stack([g.norm() for g in theirs.values()]).median()
    for name, value in theirs.items():
        difference = (ours[name].double() - value.double()).norm()
        assert difference <= allowed * max(value.norm(), 0.1 * typical), name


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a timm, torchvision or transformers model."""
    kinds = ("Block", "EvaBlock", "EncoderBlock")
    return [m for m in model.modules() if type(m).__name__ in kinds or type(m).__name__.endswith("Layer")]


def check_dropout_in_training(original: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """A step in training draws and gives what the original's does, without our attention, which eval mode has again; returns
    the accelerated model."""
    model = vitfast.accelerate(copy.deepcopy(original))
    assert_same_step(step(model.train(), inputs), step(original.train(), inputs))
    with Calls() as calls:
        run(model, inputs)
    assert calls["attention"] == 0
    with Calls() as calls:
        run(model.eval(), inputs)
    assert calls["attention"] == 2
    return model
