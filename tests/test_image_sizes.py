"""Image and patch sizes that change at run time, against timm and the plain computation."""

import pytest
import torch
from model_checks import DINO, MIXED, PLAIN, REG, assert_same, batch, ours, pair, rel, run, small, twins
from torch import nn


@pytest.mark.parametrize("name", [PLAIN, REG, DINO, "eva02_tiny_patch14_224", MIXED])
@pytest.mark.parametrize("pad", [False, True])
def test_run_time_image_size(name, pad):
    options = {"dynamic_img_size": True, "dynamic_img_pad": pad}
    reference, model = pair(name, **small(name), **options)
    P = model.patch_embed.patch_size[0]
    for size in [(4 * P, 4 * P), (3 * P, 5 * P), (2 * P + 3, P + 1) if pad else (6 * P, 2 * P)]:
        images, d_logits = batch(model, img_size=size)
        assert_same(run(model, images, d_logits), run(reference, images, d_logits))
        fmt = {"indices": [0], "intermediates_only": True}
        assert (
            rel(model.forward_intermediates(images, **fmt)[0], reference.forward_intermediates(images, **fmt)[0])
            <= 1e-5
        )


def test_positions_of_one_column_of_patches():
    """timm's own numbers are wrong here: it resizes a channels-last tensor, which PyTorch gets wrong at width 1."""
    model = ours(PLAIN, dynamic_img_size=True)
    grid = model.pos_embed[:, 1:].detach().double().transpose(1, 2).unflatten(2, (4, 4)).contiguous()
    wanted = nn.functional.interpolate(grid, size=(6, 1), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert rel(model.positions((6, 1))[:, 1:], wanted) <= 1e-6


def test_padding_of_raw_pixels_is_the_mean_colour():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    raw, plain = twins("deit_tiny_patch16_224", options | {"normalize": True}, options)
    pixels = torch.randint(0, 256, (2, 3, 30, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (plain.config.mean, plain.config.std))
    assert rel(raw(pixels), plain((pixels / 255 - mean) / std)) <= 1e-5


@pytest.mark.parametrize("change", [{"img_size": (80, 48)}, {"patch_size": 8}, {"img_size": 96, "patch_size": 24}])
@pytest.mark.parametrize("name", [PLAIN, "deit3_small_patch16_224", "eva02_base_patch16_clip_224"])
def test_set_input_size(name, change):
    reference, model = pair(name, **small(name))
    model.set_input_size(**change)
    reference.set_input_size(**{key: v if isinstance(v, tuple) else (v, v) for key, v in change.items()})
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))
    twin = type(model)(model.config)  # the configuration followed
    twin.load_state_dict(model.state_dict())
    assert rel(twin(images), model(images)) <= 1e-6
