"""``vitfast.accelerate`` on real architectures: the same numbers from fused blocks, and the model stays the same object."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate_checks import HF, ONE_EACH, VIT, Calls, blocks, error, pair, run
from torch import nn

import vitfast
from vitfast.benchmarks.architectures import NAMES, build

# The same kind as another name once they are small
TWINS = {
    "timm/vit_base_patch16_224",
    "timm/vit_base_patch8_224",
    "timm/vit_so400m_patch14_siglip_224",
    "timm/vit_base_patch14_dinov2",
    "timm/eva02_base_patch14_224",
    "torchvision/vit_l_16",
    "torchvision/vit_b_32",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
}
NOT_ALL_FUSED = {"timm/vit_base_patch16_rope_mixed_224": "learned for each head"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TWINS])
def test_parity_and_gradients(name: str) -> None:
    """fp32 within 1e-5, every gradient, and bf16 within 1.2 of the original's own error: what ``verify`` calls passed."""
    model, inputs = build(name, small=True, batch=8)
    vitfast.accelerate(model)
    report = vitfast.verify(model, images=inputs)
    assert report.passed, f"\n{report}"
    worst = {row.worst: row.worst_error for row in report.rows if (row.dtype, row.what) == ("float32", "gradients")}
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("name", [n for n in NAMES if n not in TWINS])
@pytest.mark.parametrize("batch", [1, 10])
def test_every_block_runs_fused(name: str, batch: int) -> None:
    """At inference, where a small batch has its own way with separate q, k and v."""
    original, inputs = build(name, small=True, batch=batch)
    model = copy.deepcopy(original)
    count = len(blocks(model))
    vitfast.accelerate(model)
    with Calls() as calls, torch.no_grad():
        ours = run(model, inputs)
    with torch.no_grad():
        assert error(ours, run(original, inputs)) <= 1e-5
        assert error(run(model, inputs), ours) <= 1e-6  # with nothing watching, ops skip the dispatcher
    rows = [row for row in vitfast.report(model).rows if "attention" in row.fused or "mlp" in row.fused]
    assert len(rows) == count
    if name in NOT_ALL_FUSED:
        assert all(NOT_ALL_FUSED[name] in row.reason for row in rows)
    else:
        assert calls["attention"] + calls["norm_attention"] == count
        assert {row.action for row in rows} == {"replaced"}
    assert calls["norm_mlp"] + calls["norm_linear"] >= count
    assert calls["patch_embed"] == ("naflex" not in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parity_at_full_width(name: str) -> None:
    model, inputs = build(name)
    for parent in model.modules():  # full width, six blocks: a giant's fp64 step would take minutes otherwise
        for child_name, child in parent.named_children():
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 6 and blocks(child):
                setattr(parent, child_name, child[:6])
    vitfast.accelerate(model)
    report = vitfast.verify(model, images=inputs)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("name", ONE_EACH)
def test_state_class_and_parameters_stay(name: str) -> None:
    original, inputs = build(name, small=True)
    state, text, classes = original.state_dict(), repr(original), [type(m) for m in original.modules()]
    tensors = dict(original.named_parameters())
    model = vitfast.accelerate(original)
    assert model is original
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[k].data_ptr() == v.data_ptr() for k, v in state.items())
    assert all(p is tensors[n] for n, p in model.named_parameters())
    assert repr(model) == text
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), classes, strict=True))
    model.load_state_dict(state, strict=True)
    run(model, inputs)
    assert list(model.state_dict()) == list(state)


@pytest.mark.parametrize("name", ONE_EACH)
def test_restore_gives_the_original_bits(name: str) -> None:
    model, inputs = build(name, small=True)
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    before = run(model, inputs)
    assert not torch.equal(run(vitfast.accelerate(model), inputs), before)  # fp32 rounds differently: ours did run
    assert vitfast.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert torch.equal(run(model, inputs), before)
    assert vitfast.restore(model) is model


@pytest.mark.parametrize("name", ONE_EACH)
def test_copy_pickle_and_save(name: str) -> None:
    _, model, inputs = pair(name, recompute="mlp")
    wanted = run(model, inputs)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(run(twin, inputs), wanted)
        assert vitfast.report(twin).recompute == "mlp"


@pytest.mark.parametrize("name", [VIT, HF])
def test_optimizer_made_before_still_trains(name: str) -> None:
    original, inputs = build(name, small=True)
    model = copy.deepcopy(original)
    after = []
    for m in (original, model):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        if m is model:
            vitfast.accelerate(m)
        for _ in range(2):
            optimizer.zero_grad()
            run(m, inputs).square().mean().backward()
            optimizer.step()
        after.append(run(m, inputs))
    assert error(after[1], after[0]) <= 1e-5
    assert error(after[1], run(vitfast.accelerate(build(name, small=True)[0]), inputs)) > 1e-4  # it did move
