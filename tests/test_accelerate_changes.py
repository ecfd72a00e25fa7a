"""What others change in an accelerated model takes part: hooks, adapters, own blocks, parametrizations, wrapping tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate_checks import VIT, Calls, assert_same_step, error, pair, run, step
from torch import nn
from torch.nn.utils import prune

import vitfast
from vitfast.benchmarks.architectures import build

HOOKED = ["attn", "attn.qkv", "norm1", "ls1", "mlp", "mlp.fc1", "mlp.act", "norm2", "drop_path2"]


@pytest.mark.parametrize("path", HOOKED)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_inside_a_block_fire(path: str, kind: str) -> None:
    original, model, inputs = pair(VIT)
    wanted = step(original, inputs)
    seen = []
    target = model.blocks[0].get_submodule(path)
    handle = getattr(target, f"register_{kind}_hook")(lambda *_: seen.append(path))
    with Calls() as calls:
        ours = step(model, inputs)
    assert seen == [path]
    assert calls["attention"] + calls["norm_mlp"] == 3  # only the hooked half of the first block went its own way
    assert_same_step(ours, wanted)
    handle.remove()
    with Calls() as calls:
        step(model, inputs)
    assert calls["attention"] + calls["norm_mlp"] == 4


def test_a_hook_changes_the_output_as_before() -> None:
    original, model, inputs = pair(VIT)
    for m in (original, model):
        m.blocks[1].attn.register_forward_hook(lambda _m, _i, out: out * 2)
        m.blocks[0].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        m.norm.register_forward_hook(lambda _m, _i, out: out - 1)
        m.patch_embed.proj.register_forward_hook(lambda _m, _i, out: out + 0.5)
    assert error(run(model, inputs), run(original, inputs)) <= 1e-5


def test_global_hooks_see_every_module() -> None:
    original, model, inputs = pair(VIT)
    names: list[list[str]] = []
    for m in (original, model):
        seen: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(lambda mod, *_, s=seen: s.append(type(mod).__name__))
        run(m, inputs)
        handle.remove()
        names.append(seen)
    assert names[0] == names[1]


class Lora(nn.Linear):
    """A linear layer with a low-rank addition, as adapters put it in a model's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        generator = torch.Generator().manual_seed(3)
        self.down = nn.Parameter(0.1 * torch.randn(4, base.in_features, generator=generator))
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_replaced_layers_are_used_and_reported(path: str, late: bool) -> None:
    original, _ = build(VIT, small=True)
    model = copy.deepcopy(original)
    if late:
        vitfast.accelerate(model)
    for m in (original, model):
        for block in m.blocks:
            parent, name = path.split(".")
            setattr(block.get_submodule(parent), name, Lora(block.get_submodule(path)))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    vitfast.accelerate(model)
    assert_same_step(step(model, inputs), step(original, inputs))
    rows = [row for row in vitfast.report(model).rows if row.module == "timm.Block"]
    assert {row.action for row in rows} == {"partly replaced"}
    assert all(path in row.reason and "Lora" in row.reason for row in rows)


class WithMask(nn.Module):
    """A backbone inside somebody's model, with a block of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build(VIT, small=True)[0]
        self.backbone.blocks[1].mlp = nn.Sequential(nn.Linear(128, 128), nn.Tanh())
        self.head = nn.Linear(100, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def test_inside_a_bigger_model_with_a_layer_of_its_own() -> None:
    original = WithMask()
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    assert_same_step(step(model, inputs), step(original, inputs))
    reasons = {row.path: row.reason for row in vitfast.report(model).rows}
    assert reasons["backbone.blocks.1"] == "mlp: mlp is torch.Sequential"
    assert reasons["backbone.blocks.0"] == ""


def parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv)


def old_weight_norm(model: Any) -> None:
    nn.utils.weight_norm(model.blocks[0].mlp.fc1)


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.blocks[0].mlp.fc2, "weight", 0.5)


def own_forward(model: Any) -> None:
    model.blocks[0].attn.forward = lambda x, **_: x * 3


def no_bias(model: Any) -> None:
    model.blocks[0].norm1.register_parameter("bias", None)


def wrapped_tensor(model: Any) -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    for block in model.blocks:
        w = block.mlp.fc1.weight.detach()
        block.mlp.fc1.weight = nn.Parameter(TwoTensor(w, w.clone()))


CHANGES = [parametrized, old_weight_norm, pruned, own_forward, no_bias]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_others_do_to_a_layer_is_respected(change: Callable[[Any], None], late: bool) -> None:
    original, inputs = build(VIT, small=True)
    model = build(VIT, small=True)[0]
    if late:
        vitfast.accelerate(model)
    change(original)
    change(model)
    vitfast.accelerate(model)
    assert_same_step(step(model, inputs), step(original, inputs))
    partly = [row.path for row in vitfast.report(model).rows if row.action == "partly replaced"]
    assert partly == ["blocks.0"]


def test_wrapping_tensors_go_to_the_original_code() -> None:
    original, model, inputs = pair(VIT)
    wrapped_tensor(original)
    wrapped_tensor(model)
    with torch.no_grad():
        ours, theirs = run(model, inputs), run(original, inputs)
    assert type(ours) is type(theirs)
    assert error(ours.a, theirs.a) <= 1e-5  # type: ignore[attr-defined]
    assert "TwoTensor" in vitfast.report(model).rows[-1].reason
