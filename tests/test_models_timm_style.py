"""What timm asks of each of its models, asked of every Vision Transformer we register: one block of it, or with --slow all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_checks import rel, shake, small

import vitfast
from vitfast.models.table import CONFIGS

NAMES = sorted(CONFIGS)
assert set(NAMES) <= set(vitfast.list_models())
# One of each kind of block, pooling and position for what takes seconds for each name.
KINDS = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_224",
    "vit_small_plus_patch16_dinov3_qkvb",
    "eva02_base_patch16_clip_224",
    "vit_small_patch16_rope_mixed_ape_224",
]
# At full size only up to this many parameters, as timm's tests do for machines of ordinary memory.
FULL_SIZE = 100e6


def tiny(name: str, **overrides: Any) -> Any:
    """One block, two heads of the real width, four patches; away from its start, so that everything takes part."""
    options = {**small(name, depth=1), "img_size": 2 * CONFIGS[name].patch_size, **overrides}
    return shake(vitfast.create_model(name, **options)).eval()


def images(model: Any, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, model.config.in_chans, *model.config.image_hw, generator=generator)


def assert_trains(model: Any) -> None:
    """Finite logits, and a finite gradient for every parameter."""
    logits = model.train()(images(model))
    assert logits.shape == (2, model.num_classes)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert sum(p.grad.abs().max() > 0 for p in model.parameters()) >= 0.9 * len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str) -> None:
    assert_trains(tiny(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_at_full_size(name: str) -> None:
    with torch.device("meta"):
        size = sum(p.numel() for p in vitfast.create_model(name).parameters())
    if size > FULL_SIZE or CONFIGS[name].image_hw[0] > 400:
        pytest.skip(f"{size / 1e6:.0f}M parameters at {CONFIGS[name].image_hw[0]} px: too large for a test")
    assert_trains(vitfast.create_model(name, num_classes=10))


@pytest.mark.parametrize("name", NAMES)
def test_default_configuration(name: str) -> None:
    """The settings of a name are sane, and the model on the meta device is what they say."""
    with torch.device("meta"):
        model = vitfast.create_model(name, depth=1)
        logits = model(torch.empty(2, 3, *model.config.image_hw))
    config = CONFIGS[name]
    assert (config.num_classes, config.in_chans) == (1000, 3)
    assert logits.shape == (2, 1000)
    assert all(side % config.patch_size == 0 for side in config.image_hw)
    assert len(config.mean) == len(config.std) == 3
    assert all(0 <= m < 1 for m in config.mean)
    assert all(0 < s <= 1 for s in config.std)
    assert 0 < config.crop_pct <= 1
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    assert all(getattr(config, rate) == 0.0 for rate in rates)  # a name is an architecture, not a recipe
    keys = model.state_dict().keys()
    assert {"patch_embed.proj.weight", "head.weight", "head.bias"} <= keys
    assert model.get_classifier() is model.head
    assert model.head.weight.shape == (1000, model.num_features)
    assert {n for n in model.no_weight_decay() if not n.startswith("reg")} <= keys | {"cls_token", "pos_embed"}


@pytest.mark.parametrize("name", NAMES)
def test_features_and_classifier(name: str) -> None:
    model = tiny(name)
    x = images(model)
    with torch.no_grad():
        logits = model(x)
        tokens = model.forward_features(x)
        assert tokens.shape == (2, model.num_prefix_tokens + 4, model.num_features)
        pooled = model.forward_head(tokens, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size)
        # to rounding: for the head alone, the last block makes the class token alone
        assert rel(model.forward_head(tokens), logits) <= 1e-5
        assert torch.equal(model.head(pooled), model.forward_head(tokens))

        without_head = tiny(name, num_classes=0)
        without_head.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
        assert rel(without_head(x), pooled) <= 1e-5
        model.reset_classifier(0)
        assert rel(model(x), pooled) <= 1e-5
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), model.fc_norm(tokens))  # every token


@pytest.mark.parametrize("name", NAMES)
def test_intermediates(name: str) -> None:
    model = tiny(name, depth=2)
    x = images(model)
    with torch.no_grad():
        tokens = model.forward_features(x)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, tokens)
        assert [m.shape for m in maps] == [(2, model.num_features, 2, 2)] * 2
        (last,) = model.get_intermediate_layers(x, [1], norm=True, return_prefix_tokens=True)
        patches, prefix = last if model.num_prefix_tokens else (last, last[:, :0])
        assert torch.equal(torch.cat([prefix, patches], 1), tokens)
        (first,) = model.forward_intermediates(x, [0], intermediates_only=True, stop_early=True)
        assert torch.equal(first, maps[0])
        assert rel(maps[1], maps[0]) > 1e-3  # blocks do something

        assert model.prune_intermediate_layers([0], prune_norm=True) == [0]
        assert len(model.blocks) == 1
        assert torch.equal(model.forward_intermediates(x, intermediates_only=True)[0], maps[0])
        assert torch.equal(model(x)[:, model.num_prefix_tokens :], maps[0].flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    "name", [*KINDS[:2], *[pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in KINDS[:2]]]
)
def test_export(name: str) -> None:
    model = tiny(name)
    x = images(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert rel(program.module()(x), model(x)) <= 1e-6
