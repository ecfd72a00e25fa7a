"""Attention masks against timm, and padding against the image without it."""

import pytest
import torch
from model_checks import EVA, PLAIN, assert_same, batch, ours, pair, rel, run, small


@pytest.mark.parametrize("kind", ["bool", "float", "per image and head"])
@pytest.mark.parametrize("name", [PLAIN, EVA])
def test_attention_masks_match_timm(name, kind):
    reference, model = pair(name, **small(name))
    images, d_logits = batch(model)
    L = model.num_prefix_tokens + 16
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(2, 2, L, L, generator=generator)
    mask = {"bool": mask[0, 0] > 0.3, "float": mask[0, 0], "per image and head": mask > 0.3}[kind]
    if mask.dtype == torch.bool:
        mask = mask | torch.eye(L, dtype=torch.bool)
    wanted = run(reference, images, d_logits, attn_mask=mask)
    assert_same(run(model, images, d_logits, attn_mask=mask), wanted)
    assert rel(model(images), wanted[0]) > 1e-3
    features = reference.forward_features(images, attn_mask=mask)
    assert rel(model.forward_features(images, attn_mask=mask), features) <= 1e-5
    layers = (
        [m.get_intermediate_layers(images, 1, attn_mask=mask)[0] for m in (model, reference)] if name == PLAIN else []
    )
    assert not layers or rel(*layers) <= 1e-5


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])
def test_padding_is_as_if_it_were_not_there(pool):
    """The last two columns of patches are padding; positions are off, so that the rest is an image of its own."""
    options = {"pos_embed": "none", "dynamic_img_size": True, "global_pool": pool}
    model = ours("vit_base_patch16_siglip_224" if pool == "map" else PLAIN, **options)
    images, d_logits = batch(model)
    padding = torch.zeros(2, 4, 4, dtype=torch.bool)
    padding[:, :, 2:] = True
    wanted = run(model, images[..., :32], d_logits)
    assert_same(run(model, images, d_logits, key_padding_mask=padding.flatten(1)), wanted)
    whole = torch.cat([torch.zeros(2, model.num_prefix_tokens, dtype=torch.bool), padding.flatten(1)], 1)
    assert rel(model(images, key_padding_mask=whole), wanted[0]) <= 1e-5


def test_padding_differs_from_image_to_image_and_goes_with_patch_dropout():
    model = ours(PLAIN, pos_embed="none", dynamic_img_size=True, global_pool="avg")
    images, _ = batch(model)
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 4:] = True  # the second image has one row of patches
    logits = model(images, key_padding_mask=padding)
    assert rel(logits[:1], model(images[:1])) <= 1e-5
    assert rel(logits[1:], model(images[1:, :, :16])) <= 1e-5
    model = ours(PLAIN, patch_drop_rate=0.5, global_pool="avg")
    torch.manual_seed(3)
    _, tokens = model.start(images, key_padding_mask=padding)
    assert tokens.padding.shape == (2, 9)
    assert not tokens.padding[:, 0].any()
    assert not tokens.padding[0].any()
    assert tokens.padding[1].any()
