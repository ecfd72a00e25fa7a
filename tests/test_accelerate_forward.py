"""What callers of timm's and torchvision's models ask of a forward is answered as before: masks, sizes, intermediates, dtypes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from accelerate_checks import DINOV3, ONE_EACH, VIT, Calls, assert_same_step, blocks, error, pair, run, step

import vitfast


def masks() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    padding[1, ..., 12:] = False
    return {
        "padding": padding,
        "bool": torch.rand(2, 1, 17, 17, generator=generator) > 0.3,
        "shared": torch.rand(17, 17, generator=generator) > 0.3,
        "float": torch.randn(2, 2, 17, 17, generator=generator),
    }


@pytest.mark.parametrize("kind", list(masks()))
def test_attention_masks(kind: str) -> None:
    original, model, inputs = pair(VIT)
    mask = masks()[kind]
    with Calls() as calls:
        ours = step(model, inputs, attn_mask=mask)
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs, attn_mask=mask))


def test_causal_attention_and_wrong_masks_are_the_originals() -> None:
    original, model, inputs = pair(VIT)
    with Calls() as calls:
        ours = run(model, inputs, is_causal=True)
    assert calls["attention"] == 0
    assert error(ours, run(original, inputs, is_causal=True)) <= 1e-5
    with pytest.raises(RuntimeError):
        run(model, inputs, attn_mask=torch.ones(3, 5))


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_query_and_key_norms(kind: str) -> None:
    norm = timm.layers.LayerNorm if kind == "layer_norm" else timm.layers.RmsNorm
    original = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, qk_norm=True)
    with torch.no_grad():
        for block in original.blocks:
            block.attn.q_norm, block.attn.k_norm = norm(64), norm(64)
        for p in original.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model = vitfast.accelerate(copy.deepcopy(original))
    inputs = {"x": torch.randn(2, 3, 64, 64)}
    with Calls() as calls:
        ours = step(model, inputs)
    assert calls["attention"] == 2
    assert_same_step(ours, step(original, inputs))


@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_intermediates_of_timm(name: str) -> None:
    original, model, inputs = pair(name)
    ours, theirs = (m.forward_intermediates(inputs["x"], indices=[0, 1], norm=True) for m in (model, original))
    assert error(ours[0], theirs[0]) <= 1e-5
    assert all(error(a, b) <= 1e-5 for a, b in zip(ours[1], theirs[1], strict=True))


def test_dynamic_image_size_and_padding_of_timm() -> None:
    original = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=2, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()
    model = vitfast.accelerate(copy.deepcopy(original))
    for size in ((64, 64), (80, 48), (70, 50)):
        inputs = {"x": torch.randn(2, 3, *size)}
        with Calls() as calls:
            ours = run(model, inputs)
        assert calls["patch_embed"] == 1
        assert error(ours, run(original, inputs)) <= 1e-5


def test_wrong_images_raise_what_they_raised() -> None:
    original, model, _ = pair(VIT)
    for images in (torch.randn(2, 3, 60, 64), torch.randn(2, 1, 64, 64), torch.randn(2, 3, 64, 64).double()):
        with pytest.raises((AssertionError, RuntimeError)) as theirs:
            original(images)
        with pytest.raises(type(theirs.value)) as ours:
            model(images)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ONE_EACH)
def test_autocast_gives_the_same_dtypes(name: str, dtype: torch.dtype) -> None:
    original, model, inputs = pair(name)
    got: list[list[torch.dtype]] = []
    for m in (original, model):
        found: list[torch.dtype] = []
        for block in blocks(m):
            block.register_forward_hook(lambda _m, _i, out, f=found: f.append(out.dtype))
        with torch.autocast("cpu", dtype):
            out = run(m, inputs)
        found.append(out.dtype)
        got.append(found)
    assert got[0] == got[1]


def test_half_weights_under_autocast_keep_their_dtype() -> None:
    """A fp32 LayerScale makes the original's residual stream fp32; the next block then meets fp32 where it has bf16."""
    original, model, _ = pair(VIT)
    x = torch.randn(2, 17, 128, dtype=torch.bfloat16)
    found = []
    for m in (original, model):
        block = m.bfloat16().blocks[1]
        block.ls2.float()
        with torch.autocast("cpu", torch.bfloat16), Calls() as calls:
            found.append((block(x).dtype, calls["attention"], calls["norm_mlp"]))
    assert found == [(torch.float32, 0, 0), (torch.float32, 1, 0)]
