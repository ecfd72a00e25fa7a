"""Where the head reads the class token alone, the last block makes no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitfast
from vitfast import ops

NAMES = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {"drop_path_rate": 0.5},  # LayerScale
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "global_pool": "token"},
    "vit_medium_patch16_rope_reg1_gap_256": {"global_pool": "token", "class_token": True, "img_size": 64},
}


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model = vitfast.create_model(name, **({"depth": 2, "num_classes": 5, "img_size": 64} | NAMES[name] | options))
    for parameter in model.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.double()


def images_for(model: nn.Module) -> Tensor:
    return torch.randn(3, 3, *model.config.image_hw, dtype=torch.double)


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(logits.sin().sum(), list(model.parameters())))


@pytest.fixture
def token_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each block's second half was given."""
    counts: list[int] = []
    whole = ops.norm_mlp

    def counted(x: Tensor, *args: object, **options: object) -> Tensor:
        counts.append(x.shape[1])
        return whole(x, *args, **options)

    monkeypatch.setattr(ops, "norm_mlp", counted)
    return counts


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_same_logits_and_gradients(name: str, training: bool, token_counts: list[int]) -> None:
    model = make(name).train(training)
    images = images_for(model)
    torch.manual_seed(1)  # of DropPath
    logits = model(images)
    assert token_counts[1] == 1 < token_counts[0]
    torch.manual_seed(1)
    full = model.forward_head(model.forward_features(images))
    assert token_counts[3] == token_counts[0]
    torch.testing.assert_close(logits, full)
    for short, long in zip(gradients(model, logits), gradients(model, full), strict=True):
        torch.testing.assert_close(short, long)


@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_every_recompute_policy(recompute: str) -> None:
    model, other = make("deit3_small_patch16_224"), make("deit3_small_patch16_224", recompute=recompute)
    images = images_for(model)
    for one, two in zip(gradients(model.eval(), model(images)), gradients(other.eval(), other(images)), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("part", ["blocks.1", "blocks.1.mlp", "norm"])
def test_who_looks_sees_every_token(part: str) -> None:
    model = make("vit_tiny_patch16_224").eval()
    shapes: list[int] = []
    model.get_submodule(part).register_forward_hook(lambda module, args, out: shapes.append(out.shape[1]))
    model(images_for(model))
    assert shapes == [17]


@pytest.mark.parametrize("options", [{"proj_drop_rate": 0.1}, {"attn_drop_rate": 0.1}, {"global_pool": "avg"}])
def test_not_where_other_tokens_count(options: dict[str, object], token_counts: list[int]) -> None:
    model = make("vit_tiny_patch16_224", **options).train()
    model(images_for(model))
    assert set(token_counts) <= {17}


def test_masks_reach_the_class_token() -> None:
    model = make("vit_tiny_patch16_224").eval()
    images, hidden = images_for(model), torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, 8:] = True
    masked = model(images, key_padding_mask=hidden)
    torch.testing.assert_close(masked, model.forward_head(model.forward_features(images, key_padding_mask=hidden)))
    assert not torch.allclose(masked, model(images))


def test_compiles_in_one_graph() -> None:
    model = make("vit_tiny_patch16_224").eval()
    images = images_for(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images))
