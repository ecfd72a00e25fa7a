"""Options of the models against timm's: dropout of patches, attention and positions, norms, pooling; and which settings are refused."""

import copy

import pytest
import torch
from model_checks import DINO, EVA, MIXED, PLAIN, REG, assert_same, batch, flat, ours, pair, rel, run, small

import vitfast
from vitfast.models.reference import reference_forward


@pytest.mark.parametrize("name", [PLAIN, REG, DINO, "eva02_tiny_patch14_224", MIXED])
def test_patch_dropout_draws_as_timm(name):
    reference, model = pair(name, **small(name), patch_drop_rate=0.4)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    assert_same(run(model, images, d_logits), wanted)
    assert model.start(images)[0].shape[1] == model.num_prefix_tokens + 9  # int(16 * 0.6)
    assert rel(model.eval()(images), reference.eval()(images)) <= 1e-5


@pytest.mark.parametrize("name", [PLAIN, EVA, MIXED])
def test_attention_dropout_draws_as_timm(name):
    reference, model = pair(name, **small(name), attn_drop_rate=0.3)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    got = run(model, images, d_logits)
    assert_same(got, wanted)
    assert rel(model.eval()(images), got[0]) > 1e-3
    assert rel(model(images), reference.eval()(images)) <= 1e-5


@pytest.mark.parametrize("name", [DINO, MIXED])
def test_rope_augmentation_draws_as_timm(name):
    rates = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.3, "rope_rescale_coords": 2.0}
    reference, model = pair(name, **small(name), **rates)
    images, d_logits = batch(model, 4)
    torch.manual_seed(4)
    wanted = run(reference, images, d_logits)
    torch.manual_seed(4)
    got = run(model, images, d_logits)
    assert_same(got, wanted)
    assert rel(model.eval()(images), got[0]) > 1e-4
    assert rel(model(images), reference.eval()(images)) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"pos_embed": "none"},
        {"final_norm": False},
        {"pool_include_prefix": True, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"class_token": False, "global_pool": "avgmax", "reg_tokens": 3},
        {"global_pool": "max", "fc_norm": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_match_timm(options):
    reference, model = pair(PLAIN, **small(PLAIN), **options)
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))


def test_eva_options_match_timm():
    options = {"qk_norm": True, "global_pool": "avgmax"}
    reference, model = pair(DINO, **small(DINO), **options)
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))


@pytest.mark.parametrize(
    "name", [EVA, *(pytest.param(name, marks=pytest.mark.slow) for name in (DINO, MIXED, "vit_giant_patch14_dinov2"))]
)
def test_new_kinds_compile_and_recompute(name):
    model = ours(name)
    images, d_logits = batch(model)
    wanted = run(model, images, d_logits)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert rel(compiled(images), wanted[0]) <= 1e-6
    model.recompute = "block"
    got = run(model, images, d_logits)
    assert rel(flat(got[1]), flat(wanted[1])) <= 1e-6


def test_rotary_tables_do_not_leak_between_modes():
    model = ours(DINO)
    images, d_logits = batch(model)
    with torch.inference_mode():
        wanted = model(images)
    assert rel(run(model, images, d_logits)[0], wanted) <= 1e-6  # cached tables of inference mode could not be saved
    assert len(model.rope._cache) == 1
    assert rel(copy.deepcopy(model)(images), wanted) <= 1e-6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (PLAIN, {"mlp_layer": "glu"}, "mlp_layer must be one of 'mlp', 'swiglu_packed', 'swiglu', got 'glu'"),
        (PLAIN, {"qkv_layout": "split"}, "qkv_layout must be one of 'fused', 'split_bias', 'separate', got 'split'"),
        (PLAIN, {"block": "beit"}, "block must be one of 'vit', 'eva', got 'beit'"),
        (PLAIN, {"pos_embed": "sincos"}, "pos_embed must be one of 'learn', 'none', got 'sincos'"),
        (PLAIN, {"rope_type": "axial"}, "rope_type must be one of .*got 'axial'"),
        (PLAIN, {"patch_drop_rate": 1.0}, r"patch_drop_rate must be in \[0, 1\), got 1.0"),
        (PLAIN, {"attn_drop_rate": -0.1}, r"attn_drop_rate must be in \[0, 1\), got -0.1"),
        (PLAIN, {"token_merging": -1}, "token_merging must be an integer of at least 0, got -1"),
        (PLAIN, {"dynamic_img_pad": True}, "dynamic_img_pad=True needs dynamic_img_size=True"),
        (DINO, {"token_merging": 4}, "token_merging needs rope_type=None"),
        (DINO, {"rope_jitter_coords": 0.5}, "rope_jitter_coords must be at least 1 and finite, got 0.5"),
        (DINO, {"rope_temperature": 0.0}, "rope_temperature must be above 0, got 0.0"),
        (DINO, {"num_heads": 64}, "rope_type needs heads of a multiple of 4, got 384 / 64"),
        (DINO, {"ref_feat_shape": 14}, "ref_feat_shape is for rope_type='cat', got 'dinov3'"),
        (MIXED, {"rope_rotate_half": True}, "rope_rotate_half=True does not go with rope_type='mixed'"),
        (PLAIN, {"attn_pool_num_heads": 5}, "attn_pool_num_heads must divide embed_dim, got 5 and 192"),
    ],
)
def test_bad_settings_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        vitfast.create_model(name, **options)


def test_bad_input_is_named():
    model = ours(PLAIN, dynamic_img_size=True)
    images, _ = batch(model)
    with pytest.raises(ValueError, match=r"multiples of the patch size 16 .*got \(32, 30\)"):
        model(images[:, :, :32, :30])
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool of shape \(2, 16\) or \(2, 17\), got torch.f"):
        model(images, key_padding_mask=torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"layers must name blocks of 0\.\.1 "):
        model.attention_maps(images, [2])
    with pytest.raises(ValueError, match=r"heads must be numbers of 0..1 .*got \[2\]"):
        model.attention_maps(images, heads=[2])
    with pytest.raises(ValueError, match="at least one image, got none"):
        model.forward_packed([])
    with pytest.raises(ValueError, match=r"images\[1\] must be \[C, H, W\], got shape \(1, 3, 32, 32\)"):
        model.forward_packed([images[0], images[:1, :, :32, :32]])
    with pytest.raises(ValueError, match=r"images\[0\] must be multiples of the patch size 16"):
        model.forward_packed([images[0, :, :30]])
    with pytest.raises(ValueError, match="patch_size must be one number"):
        model.set_input_size(patch_size=(8, 16))
    merging = ours(PLAIN, token_merging=2)
    for call, message in [
        (lambda: merging.forward_packed([images[0]]), "forward_packed does not go with token_merging"),
        (lambda: merging.forward_intermediates(images), "output_fmt must be 'NLC' where tokens are merged"),
        (lambda: merging(images, key_padding_mask=torch.zeros(2, 16).bool()), "does not go with token_merging"),
        (lambda: reference_forward(merging, images), "no plain reference for MergingBlock"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    dropping = ours(PLAIN, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match="attn_mask does not go with patch_drop_rate"):
        dropping(images, attn_mask=torch.zeros(17, 17))
