"""Positions, patch filters and input channels are resampled as timm does."""

import pytest
import timm
import torch
from model_checks import rel
from timm.layers import resample_abs_pos_embed

from vitfast.layers.resample import adapt_input_channels, resample_patch_embed, resample_pos_embed


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("new_size", [(4, 4), (7, 7), (3, 2), (5, 9)])
@pytest.mark.parametrize("mode", [("bicubic", True), ("bilinear", False)])
def test_resample_pos_embed_is_timms(prefix, new_size, mode):
    pos_embed = torch.randn(1, prefix + 16, 12, generator=torch.Generator().manual_seed(3))
    ours = resample_pos_embed(pos_embed, new_size, num_prefix_tokens=prefix, interpolation=mode[0], antialias=mode[1])
    wanted = resample_abs_pos_embed(
        pos_embed, new_size, num_prefix_tokens=prefix, interpolation=mode[0], antialias=mode[1]
    )
    assert ours.shape == wanted.shape
    assert rel(ours, wanted) <= 1e-6
    assert resample_pos_embed(pos_embed.bfloat16(), new_size, num_prefix_tokens=prefix).dtype == torch.bfloat16


def test_resample_pos_embed_from_a_rectangle():
    pos_embed = torch.randn(1, 1 + 15, 12, generator=torch.Generator().manual_seed(3))
    wanted = resample_abs_pos_embed(pos_embed, (6, 6), old_size=(3, 5))
    assert rel(resample_pos_embed(pos_embed, (6, 6), (3, 5)), wanted) <= 1e-6
    with pytest.raises(ValueError, match="15 patches beside 1 prefix tokens, which is not a grid of 3 x 3"):
        resample_pos_embed(pos_embed, (6, 6))


@pytest.mark.parametrize("new_size", [(8, 8), (24, 24), (12, 20), (16, 16)])
@pytest.mark.parametrize("mode", [("bicubic", True), ("bilinear", False)])
def test_resample_patch_embed_is_timms(new_size, mode):
    weight = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = resample_patch_embed(weight, new_size, interpolation=mode[0], antialias=mode[1])
    wanted = timm.layers.resample_patch_embed(weight, new_size, interpolation=mode[0], antialias=mode[1])
    assert ours.shape == wanted.shape
    assert rel(ours, wanted) <= 1e-6
    assert resample_patch_embed(weight.bfloat16(), new_size).dtype == torch.bfloat16


def test_resampled_filters_see_a_resized_patch_as_before():
    """What FlexiViT's resize is for: enlarging patch and filter together leaves the product."""
    generator = torch.Generator().manual_seed(3)
    weight, patch = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(1, 3, 8, 8, generator=generator)
    larger = torch.nn.functional.interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    product = (resample_patch_embed(weight, (16, 16)) * larger).sum((1, 2, 3))
    assert rel(product, (weight * patch).sum((1, 2, 3))) <= 1e-4


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_input_channels_are_timms(in_chans):
    from timm.models._manipulate import adapt_input_conv

    weight = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    assert rel(adapt_input_channels(weight, in_chans), adapt_input_conv(in_chans, weight)) <= 1e-6


def test_bad_resampling_is_named():
    with pytest.raises(ValueError, match=r"weight must be \[D, C, P, P\], got shape \(4, 12\)"):
        resample_patch_embed(torch.zeros(4, 12), (2, 2))
    with pytest.raises(ValueError, match=r"in_chans at least 1, got .* and 0"):
        adapt_input_channels(torch.zeros(4, 3, 2, 2), 0)
