"""What tests of models share: small versions of named models, timm's twin of one, an adapter, outputs and gradients."""

import timm
import torch
from torch import nn

import vitfast
from vitfast.models.table import CONFIGS

PLAIN, DINO, EVA = "vit_tiny_patch16_224", "vit_small_patch16_dinov3", "eva02_base_patch16_clip_224"
REG = "vit_small_patch14_reg4_dinov2"
MIXED = "vit_small_patch16_rope_mixed_224"


def small(name, depth=2, heads=2):
    """Overrides that keep a named model's kind and cut its cost: few blocks, 4 x 4 patches, few heads of its width."""
    config = CONFIGS[name]
    head_dim = config.embed_dim // config.num_heads
    narrow = {"num_heads": heads, "embed_dim": heads * head_dim} if heads else {}
    return {"depth": depth, "img_size": 4 * config.patch_size, "num_classes": 10, **narrow}


def shake(model):
    """Moves every parameter away from its start, so that zero biases, tokens and tiny LayerScales take part."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim == 1 else 0.02))
    return model


def pair(name, ours=None, **overrides):
    """timm's model and ours, with timm's weights loaded strictly; ``ours`` are further overrides of ours alone."""
    reference = shake(timm.create_model(name, **overrides))
    model = vitfast.create_model(name, **overrides, **(ours or {}))
    model.load_state_dict(reference.state_dict(), strict=True)
    return reference, model


def ours(name, **overrides):
    """A small version of a named model, away from its start."""
    return shake(vitfast.create_model(name, **{**small(name), **overrides}))


def twins(name, first, second):
    """Two models with the same parameters and other options."""
    models = [ours(name, **options) for options in (first, second)]
    models[1].load_state_dict(models[0].state_dict())
    return models


class LowRank(nn.Module):
    """An adapter as libraries put it around a linear layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def batch(model, size=2, img_size=None):
    generator = torch.Generator().manual_seed(2)
    height, width = img_size or model.patch_embed.img_size
    images = torch.randn(size, model.patch_embed.proj.in_channels, height, width, generator=generator)
    return images, torch.randn(size, model.num_classes, generator=generator)


def run(model, images, d_logits, autocast=False, **options):
    """Logits and every parameter's gradient."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images, **options)
    logits.backward(d_logits.to(logits.dtype))
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rel(value, truth):
    """Norm of the difference over the norm, in fp64."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def flat(grads):
    return torch.cat([g.double().flatten() for g in grads.values()])


def assert_same(ours, theirs, allowed=1e-5):
    """Two results of ``run``: logits and each gradient within the project's bar for fp32 parity.

    A gradient that is nothing but rounding (k's bias, which softmax does not see) is held to the size of the others.
    """
    assert rel(ours[0], theirs[0]) <= allowed
    assert set(ours[1]) == set(theirs[1])
    least = 1e-3 * flat(theirs[1]).norm()
    errors = {key: (g - theirs[1][key]).norm() / max(theirs[1][key].norm(), least) for key, g in ours[1].items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= allowed, f"{worst}: {errors[worst]:.2g}"
