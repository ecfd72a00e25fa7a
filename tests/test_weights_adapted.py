"""Weights load into models of another size, patch, prefix, or layout of q, k and v."""

import pytest
import torch
from model_checks import rel
from timm.layers import resample_abs_pos_embed
from weights_checks import TINY, images, shaken, timm_file, tiny, tiny_timm

import vitfast


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": 48},
        {"img_size": (24, 40)},
        {"patch_size": 4},
        {"patch_size": 16, "img_size": 64},
        {"in_chans": 1},
        {"in_chans": 5},
    ],
    ids=str,
)
def test_sizes_patches_and_channels_are_adapted_as_timm_does(tmp_path, change):
    from timm.models._manipulate import adapt_input_conv
    from timm.models.vision_transformer import checkpoint_filter_fn

    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    other = tiny_timm(**change)
    weights = source.state_dict()
    key = "patch_embed.proj.weight"
    weights[key] = adapt_input_conv(other.in_chans, weights[key])
    other.load_state_dict(checkpoint_filter_fn(weights, other), strict=True)
    model = vitfast.load_pretrained(tiny(**change), path)
    for name, value in other.state_dict().items():
        assert rel(model.state_dict()[name], value) <= 1e-6, name


def test_positions_of_the_class_token_move_into_it(tmp_path):
    """A model whose positions are for patches only computes the same from a file where they are for all tokens."""
    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    model = vitfast.load_pretrained(tiny(no_embed_class=True), path)
    assert rel(model(images()), source(images())) <= 1e-5
    back = tmp_path / "back.pth"
    torch.save(model.state_dict(), back)
    assert rel(vitfast.load_pretrained(tiny(), back)(images()), source(images())) <= 1e-5


@pytest.mark.parametrize("img_size", [32, 40])
def test_registers_are_added_and_left_out(tmp_path, caplog, img_size):
    caplog.set_level("INFO")
    source = tiny(reg_tokens=4)
    source = shaken(source)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    fewer = vitfast.load_pretrained(tiny(reg_tokens=2, img_size=img_size), path)
    assert torch.equal(fewer.reg_token, source.reg_token[:, :2])
    assert torch.equal(fewer.pos_embed[:, :3], source.pos_embed[:, :3])
    assert "2 register tokens from 4" in caplog.text
    none = vitfast.load_pretrained(tiny(img_size=img_size), path)
    assert torch.equal(none.pos_embed[:, :1], source.pos_embed[:, :1])
    assert torch.equal(none.pos_embed[:, 1:], fewer.pos_embed[:, 3:])
    assert "register tokens left out: the model has none" in caplog.text
    more = tiny(reg_tokens=6)
    start = more.reg_token.detach().clone()
    vitfast.load_pretrained(more, path)
    assert torch.equal(more.reg_token[:, :4], source.reg_token)
    assert torch.equal(more.reg_token[:, 4:], start[:, 4:])
    assert not more.pos_embed[:, 5:7].any()
    assert torch.equal(more.pos_embed[:, 7:], source.pos_embed[:, 5:])
    without = vitfast.load_pretrained(tiny(class_token=False, global_pool="avg"), path)
    assert "class token left out" in caplog.text
    assert "the final norm became fc_norm" in caplog.text
    assert torch.equal(without.pos_embed, source.pos_embed[:, 5:])


def test_a_grid_that_is_no_square(tmp_path):
    source = tiny(img_size=(16, 40))
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"pos_embed has 11 rows, .*give grid=\(rows, columns\)"):
        vitfast.load_pretrained(tiny(), path)
    model = vitfast.load_pretrained(tiny(), path, grid=(2, 5))
    wanted = resample_abs_pos_embed(source.pos_embed, (4, 4), (2, 5))
    assert rel(model.pos_embed, wanted) <= 1e-6


@pytest.mark.parametrize("there", ["fused", "split_bias", "separate"])
@pytest.mark.parametrize("here", ["fused", "split_bias", "separate"])
def test_layouts_of_q_k_and_v_convert(tmp_path, there, here):
    gated = {"fused": "swiglu_packed", "split_bias": "swiglu_packed", "separate": "swiglu"}
    source, model = (
        shaken(
            vitfast.create_model(
                "eva02_tiny_patch14_224",
                **TINY,
                qkv_layout=layout,
                mlp_layer=gated[layout],
                block="vit" if layout == "fused" else "eva",
                fc_norm=True,
                init_values=1e-5,
            )
        )
        for layout in (there, here)
    )
    if there == "fused":
        for block in source.blocks:
            block.attn.qkv.bias.data[64:128] = 0  # k's bias, for which the others have no place
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    assert rel(vitfast.load_pretrained(model, path)(images()), source(images())) <= 1e-5


def test_a_bias_of_k_that_counts_is_not_dropped(tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "weights.pth"
    source = tiny_timm()
    torch.save(source.state_dict(), path)
    without_rope = vitfast.load_pretrained(tiny(qkv_layout="split_bias"), path)
    assert "the bias of k left out, which softmax does not see" in caplog.text
    assert rel(without_rope(images()), source(images())) <= 1e-5
    with pytest.raises(ValueError, match=r"unexpected: blocks\.0\.attn\.qkv\.bias"):
        vitfast.load_pretrained(tiny(qkv_layout="split_bias", rope_type="cat"), path)
