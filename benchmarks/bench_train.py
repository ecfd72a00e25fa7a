"""A training step (forward, loss, backward, AdamW) for every recompute policy beside timm; and the memory it keeps.

``train`` times the step, ``memory`` only counts what autograd keeps and the peak, over growing batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.models.config import RECOMPUTES
from vitfast.models.reference import reference_forward

from . import bench_model
from .bench_model import Models, forward_work
from .harness import TORCH_DTYPE, Case, Provider, Work
from .peers import attempt, compiled, installed
from .presets import along, distinct

OPS = ("train",)
MEMORY_OPS = ("memory",)
PEERS = ("timm",)
DEFAULTS: dict[str, int | str] = {"model": "vit_small_patch16_224", "B": 8}
OPTIONAL = bench_model.OPTIONAL
check = bench_model.check
SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"model": "vit_tiny_patch16_224", "B": 2}],
    "overview cuda": [{"model": "vit_base_patch16_224", "B": 64}],
    "cpu": [{}],
    "cuda": [
        {"model": "vit_base_patch16_224", "B": 256},
        {"model": "vit_base_patch16_dinov3", "B": 128},  # rotation, LayerScale, 201 tokens
        {"model": "vit_so400m_patch14_siglip_224", "B": 64},  # heads of 72
        {"B": 256},
    ],
    "growth": distinct(
        along("B", (1, 4, 16), {"model": "vit_tiny_patch16_224"}),
        along("L", (197, 577, 1025), {"model": "vit_tiny_patch16_224", "B": 1}),
    ),
    "growth cuda": distinct(
        along("B", (8, 32, 128, 256), {"model": "vit_base_patch16_224"}),
        along("L", (197, 577, 1025, 2305), {"model": "vit_base_patch16_224", "B": 8}),
    ),
    "dry": [{"model": "vit_tiny_patch16_224", "B": 1, "depth": 1}],
}
MEMORY_SHAPES: dict[str, list[dict[str, int | str]]] = {
    "overview cpu": [{"model": "vit_tiny_patch16_224", "B": 2}],
    "overview cuda": [{"model": "vit_base_patch16_224", "B": 64}],
    "cpu": [{"B": batch} for batch in (1, 4, 8)],
    "cuda": [{"model": "vit_base_patch16_224", "B": batch} for batch in (16, 64, 256)],
    "growth": SHAPES["growth"],
    "growth cuda": SHAPES["growth cuda"],
    "dry": SHAPES["dry"],
}
_GATE_SAMPLES = 2
_CLASSES_SEED = 3


def case(op: str, shape: dict[str, int | str], dtype: str, device: str) -> Case:
    models = Models(shape, dtype, device)
    autocast = dtype == "autocast"
    config, element = models.ours.config, TORCH_DTYPE[dtype].itemsize
    parameters = sum(p.numel() for p in models.ours.parameters())
    forward = forward_work(config, models.batch, element)
    # two products backward for each forward; AdamW reads weight, gradient and both moments and writes all but the gradient
    backward = [Work(2 * part.bytes, 2 * part.flops) for part in forward]
    optimizer = Work(7 * parameters * models.kind.itemsize, 0)
    labels = torch.randint(
        0, config.num_classes, (models.batch,), generator=torch.Generator().manual_seed(_CLASSES_SEED)
    ).to(device)
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device=device,
        inputs=lambda: {"images": models.images()},
        grads=(),
        reference=_first_gradients(models.ours, functools.partial(reference_forward, models.ours), device, autocast),
        truth_of=_first_gradients(models.exact, functools.partial(reference_forward, models.exact), device, False),
        providers=functools.partial(_providers, models, labels, autocast),
        work={"both": [*forward, *backward, optimizer]},
        batched=("images",),
        timed=op == "train",
        timing="host",
    )


def _first_gradients(
    model: nn.Module, forward: Callable[[Tensor], Tensor], device: str, autocast: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """images -> (logits, all gradients in the order of their names), both for the first images of the batch only."""
    parameters = [parameter for _, parameter in sorted(model.named_parameters())]

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        exact = images.dtype == torch.float64
        if exact:
            images = images[:_GATE_SAMPLES]
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast and not exact):
            logits = forward(images)
        towards = torch.zeros(logits.shape, dtype=torch.float64)
        generator = torch.Generator().manual_seed(1)
        first = logits[:_GATE_SAMPLES].shape
        towards[:_GATE_SAMPLES] = torch.randn(first, generator=generator, dtype=torch.float64)
        grads = torch.autograd.grad(logits, parameters, towards.to(logits), allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, parameters, strict=True)]
        )
        return logits.detach()[:_GATE_SAMPLES], flat

    return run


def _providers(models: Models, labels: Tensor, autocast: bool) -> list[Provider]:
    make = functools.partial(_provider, labels=labels, device=models.device, autocast=autocast)
    found = []
    for policy in RECOMPUTES:
        ours = models.fresh(policy)
        found.append(make(f"vitfast {policy}", ours, ours, ours=True))
    found.append(make("pytorch eager", models.ours, functools.partial(reference_forward, models.ours)))
    if installed("timm"):

        def timm() -> Provider:
            model = models.timm()
            return make("timm", model, model)

        def timm_compiled() -> Provider:
            model = models.timm()  # compiling takes minutes on a CPU, so there it runs only when named
            return make("timm torch.compile", model, compiled(model), slow=models.device == "cpu")

        found += [attempt("timm", timm), attempt("timm torch.compile", timm_compiled, slow=models.device == "cpu")]
    return found


def _provider(
    name: str,
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    labels: Tensor,
    device: str,
    autocast: bool,
    **options: Any,
) -> Provider:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def loss_of(images: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return F.cross_entropy(forward(images).float(), labels)

    def step(images: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(images).backward()
        optimizer.step()

    return Provider(
        name,
        _first_gradients(model, forward, device, autocast),
        directions=("both",),
        step=step,
        forward=loss_of,
        parameters=(*model.parameters(), labels),
        **options,
    )
