"""Accelerated models in training: the same random draws and gradients, and recomputation that keeps less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from accelerate_checks import (
    DINOV3,
    HF,
    VIT,
    Calls,
    assert_same_step,
    check_dropout_in_training,
    error,
    pair,
    run,
    step,
)
from torch import nn

import vitfast
from vitfast.benchmarks.architectures import build


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_drop_path_draws_what_the_original_draws(autocast: bool) -> None:
    original, inputs = build(VIT, small=True, batch=16)
    for i, block in enumerate(original.blocks):
        block.drop_path1, block.drop_path2 = (timm.layers.DropPath(0.3 + 0.2 * i) for _ in range(2))
    model = vitfast.accelerate(copy.deepcopy(original)).train()
    original.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = run(original, inputs)
        after = torch.get_rng_state()
        with Calls() as calls:
            ours = run(model, inputs)
    assert calls["attention"] == 2
    assert torch.equal(torch.get_rng_state(), after)
    assert ours.dtype == theirs.dtype
    # one sample that is dropped on one side only would be an error of order 1
    assert error(ours, theirs) <= (2e-2 if autocast else 1e-5)
    assert error(ours, run(model, inputs, seed=1)) > 0.1


def dropouts(name: str, drop: str) -> Any:
    if name == "timm":
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=64,
            depth=2,
            **{{"attention": "attn_drop_rate", "output": "proj_drop_rate"}[drop]: 0.3},
        )
    rates = {"attention": "attention_dropout", "output": "dropout"}
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, **{rates[drop]: 0.3})


@pytest.mark.parametrize("drop", ["attention", "output"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_dropout_in_training_is_the_originals(library: str, drop: str) -> None:
    original = dropouts(library, drop)
    with torch.no_grad():
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = check_dropout_in_training(original, {"x": torch.randn(4, 3, 64, 64)})
    reasons = [row.reason for row in vitfast.report(model).rows if "attention" in row.fused]
    assert len(reasons) == 2
    assert all("p=0.3 in training" in reason for reason in reasons)


@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_patch_dropout_and_checkpointing_of_timm(name: str) -> None:
    original, inputs = build(name, small=True)
    if name == VIT:
        original.patch_drop = timm.layers.PatchDropout(0.5, num_prefix_tokens=1)
    else:
        original.patch_drop = timm.layers.PatchDropoutWithIndices(0.5, num_prefix_tokens=5)
    model = vitfast.accelerate(copy.deepcopy(original))
    for m in (original, model):
        m.train()
        m.set_grad_checkpointing()
    assert_same_step(step(model, inputs), step(original, inputs))


def test_frozen_backbone_and_gradient_of_the_images() -> None:
    original, model, inputs = pair(VIT)
    found = []
    for m in (original, model):
        m.requires_grad_(False)
        m.head.requires_grad_(True)
        m.blocks[1].attn.proj.weight.requires_grad_(True)
        images = inputs["x"].clone().requires_grad_()
        found.append(step(m, {"x": images}) | {"images": images.grad})
    assert len(found[1]) == 5
    assert_same_step(found[1], found[0])


def kept_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """What autograd keeps for backward, parameters apart."""
    parameters = {p.data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(model, inputs)
    out.sum().backward()
    return sum(found.values())


@pytest.mark.parametrize("name", [VIT, HF])
def test_recompute_keeps_less_and_changes_nothing(name: str) -> None:
    original, inputs = build(name, small=True, batch=16)
    kept = {"original": kept_bytes(original, inputs)}
    wanted = step(original, inputs)
    for recompute in ("none", "fused", "mlp", "block"):
        model = vitfast.accelerate(copy.deepcopy(original), recompute=recompute)
        assert_same_step(step(model, inputs), wanted)
        kept[recompute] = kept_bytes(model, inputs)
    assert kept["original"] > kept["fused"] > kept["mlp"] > kept["block"]
    assert kept["none"] > kept["fused"]


def test_block_recompute_draws_drop_path_once() -> None:
    original, inputs = build(VIT, small=True, batch=8)
    for block in original.blocks:
        block.drop_path1, block.drop_path2 = (timm.layers.DropPath(0.5) for _ in range(2))
    model = vitfast.accelerate(copy.deepcopy(original), recompute="block").train()
    assert_same_step(step(model, inputs), step(original.train(), inputs))


def test_second_derivatives() -> None:
    _, model, inputs = pair(VIT)
    images = inputs["x"].requires_grad_()
    (slope,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        slope.sum().backward()
    original, model, inputs = pair(VIT, backend="composite")
    found = []
    for m in (original, model):
        for block in m.blocks:
            block.attn.fused_attn = False  # PyTorch's fused attention has no second derivative on the CPU
        images = inputs["x"].detach().requires_grad_()
        (slope,) = torch.autograd.grad(m(images).square().sum(), images, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), images)[0])
    assert error(found[1], found[0]) <= 1e-5
