"""What ``vitfast.accelerate`` reports, logs and refuses, and what it leaves as it is."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
import torchvision
from accelerate_checks import VIT, assert_same_step, pair, step
from torch import nn

import vitfast
from vitfast.benchmarks.architectures import build


def test_report_is_a_table_and_data() -> None:
    original, model, _ = pair("timm/vit_base_patch16_siglip_224")
    report = vitfast.report(model)
    assert report.accelerated
    assert (report.backend, report.recompute) == ("auto", "fused")
    assert report.count("replaced") == 4
    assert [row.path for row in report.rows if row.action == "left"] == ["attn_pool"]
    assert {"path", "module", "action", "fused", "reason"} == set(report.as_dicts()[0])
    assert "blocks.*" in str(report)
    assert "pooling" in str(report)
    before = vitfast.report(original)
    assert not before.accelerated
    assert {row.action for row in before.rows} == {"left"}
    assert str(before).startswith("VisionTransformer: not accelerated")


def test_one_line_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = build(VIT, small=True)
    with caplog.at_level(logging.INFO, "vitfast"):
        vitfast.accelerate(model)
        vitfast.accelerate(model)
        vitfast.accelerate(model, recompute="mlp")
    first, second, third = (record.message for record in caplog.records)
    assert "2 x timm.Block" in first
    assert "already" in second
    assert "recompute=mlp" in third
    assert vitfast.report(model).recompute == "mlp"


def test_unsupported_models_are_named_and_untouched() -> None:
    for model in (
        timm.create_model("resnet18", pretrained=False),
        timm.create_model("swin_tiny_patch4_window7_224", pretrained=False),
        torchvision.models.resnet18(),
        nn.Linear(3, 3),
    ):
        classes = [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=rf"{type(model).__name__}.*timm VisionTransformer.*torchvision.*DINOv3"):
            vitfast.accelerate(model)
        assert [type(m) for m in model.modules()] == classes
        assert vitfast.restore(model) is model


def test_bad_arguments() -> None:
    model, _ = build(VIT, small=True)
    with pytest.raises(ValueError, match="backend is 'fast'; allowed are"):
        vitfast.accelerate(model, backend="fast")
    with pytest.raises(ValueError, match="recompute is 'all'; allowed are 'none', 'fused', 'mlp', 'block'"):
        vitfast.accelerate(model, recompute="all")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        vitfast.accelerate(model, backend="cuda")
    for call in (vitfast.accelerate, vitfast.report, vitfast.restore):
        with pytest.raises(ValueError, match="model is a str"):
            call("vit")
    assert not vitfast.report(model).accelerated


def test_our_own_models_are_returned_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1)
    classes = [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, "vitfast"):
        assert vitfast.accelerate(model) is model
    assert "already" in caplog.text
    assert [type(m) for m in model.modules()] == classes


def test_mixed_devices_are_left_and_reported() -> None:
    model, _ = build(VIT, small=True)
    model.blocks[0].mlp.fc1.to("meta")
    model.blocks[1].to("meta")
    vitfast.accelerate(model)
    rows = {row.path: row for row in vitfast.report(model).rows}
    assert rows["blocks.0"].fused == ("attention",)
    assert "on cpu and meta" in rows["blocks.0"].reason
    assert rows["blocks.1"].action == "replaced"  # it is on one device; where x is elsewhere, its own code complains


class OwnBlock(timm.models.vision_transformer.Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_subclasses_and_other_blocks_are_left() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, block_fn=OwnBlock)
    vitfast.accelerate(model)  # its patches and its norm
    reasons = [row.reason for row in vitfast.report(model).rows if row.module.endswith("OwnBlock")]
    assert reasons == ["a subclass of a known block, which may compute something else"] * 2
    model = timm.create_model("vit_base_patch16_rpn_224", img_size=64, depth=2)
    vitfast.accelerate(model)
    assert [r.reason for r in vitfast.report(model).rows if "ResPost" in r.module] == [
        "a post-norm block: its norms stand behind the branches"
    ] * 2


def test_quantised_and_gated_attention_is_left() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
    model.blocks[0].attn.gate = nn.Linear(192, 192)
    model.blocks[1].norm1 = timm.layers.RmsNorm(192)
    original = copy.deepcopy(model)
    vitfast.accelerate(model)
    reasons = {row.path: row.reason for row in vitfast.report(model).rows}
    assert "gate" in reasons["blocks.0"]
    assert "RmsNorm" in reasons["blocks.1"]
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    assert_same_step(step(model, inputs), step(original, inputs))
