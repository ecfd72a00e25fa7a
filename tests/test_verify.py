"""``vitfast.verify``: what it finds, for our models and for accelerated ones, and that it can fail."""

from __future__ import annotations

import pytest
import timm
import torch
from accelerate_checks import pair

import vitfast


def test_our_own_model_against_plain_pytorch() -> None:
    report = vitfast.verify(vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=50))
    assert report.passed
    assert [(row.dtype, row.what) for row in report.rows] == [
        ("float32", "logits"),
        ("float32", "gradients"),
        ("bfloat16", "logits"),
        ("bfloat16", "gradients"),
    ]
    assert 0 < report.error("float32") < 1e-5
    assert str(report).count("pass") == 4
    assert report.as_dicts()[0]["passed"] is True


@pytest.mark.parametrize("explicit", [True, False], ids=["reference", "itself restored"])
def test_accelerated_model_against_its_original(explicit: bool) -> None:
    original, model, inputs = pair("openai/clip-vit-base-patch32")
    report = vitfast.verify(model, original if explicit else None, images=inputs, dtypes=[torch.float32])
    assert report.passed
    assert [row.what for row in report.rows] == ["image_embeds", "last_hidden_state", "gradients"]
    assert vitfast.report(model).accelerated  # it worked on copies


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "torchvision/vit_b_16", "google/vit-base-patch16-224"])
def test_images_are_made_to_the_models_size(name: str) -> None:
    _, model, _ = pair(name)
    assert vitfast.verify(model, dtypes=[torch.float32]).passed


def test_a_wrong_weight_fails_and_is_named() -> None:
    original, model, inputs = pair("timm/vit_tiny_patch16_224")
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight *= 1.01
    report = vitfast.verify(model, original, images=inputs["x"])
    assert not report.passed
    assert "FAIL" in str(report)
    worst = report.rows[1]
    assert worst.what == "gradients"
    assert worst.worst_error > 1e-5


def test_bad_arguments() -> None:
    _, model, _ = pair("timm/vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="reference is missing"):
        vitfast.verify(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="other parameters"):
        vitfast.verify(model, timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(ValueError, match="images are missing"):
        vitfast.verify(vitfast.accelerate(torch.nn.Sequential(pair("timm/vit_tiny_patch16_224")[0])))
