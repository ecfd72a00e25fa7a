"""Our Vision Transformers against timm's: same names, same numbers, and clear words for bad input."""

import copy
import pickle

import pytest
import timm
import torch
from model_checks import assert_same, batch, flat, pair, rel, run, shake, small
from torch import nn

import vitfast
from vitfast.models.table import CONFIGS

OURS_ONLY = {"vit_tiny_patch2_8", "vit_tiny_patch4_28", "vit_tiny_patch4_32"}
UNNAMED_IN_TIMM = {"vit_tiny_patch32_224": 224, "vit_tiny_patch32_384": 384}
TIMM_NAMES = sorted(set(CONFIGS) - OURS_ONLY - set(UNNAMED_IN_TIMM))

# One of each kind of architecture: what differs is in the comment.
KINDS = [
    "vit_tiny_patch16_224",  # class token
    "vit_small_patch32_384",  # large patch
    "vit_base_patch8_224",  # small patch
    "deit3_small_patch16_224",  # LayerScale, positions on patches only
    "vit_small_patch14_dinov2",  # LayerScale, positions on the class token too
    "vit_small_patch14_reg4_dinov2",  # registers
    "vit_base_patch16_siglip_224",  # no class token, attention pooling
    "vit_base_patch32_siglip_gap_256",  # average pooling after the norm, tanh GELU
    "vit_xsmall_patch16_clip_224",  # norm before the blocks, no patch bias, eps 1e-5
    "vit_little_patch16_reg4_gap_256",  # average pooling before the norm, odd MLP ratio
    "vit_so150m2_patch16_reg1_gap_256",  # no qkv bias, register positions
    "vit_giant_patch14_dinov2",  # SwiGLU with gate and value in one weight
    "vit_base_patch32_clip_quickgelu_224",  # quick GELU
    "beit3_base_patch16_224",  # norms before proj and fc2
    "vit_small_patch16_dinov3",  # rotary halves, gamma_1, no positions
    "vit_small_plus_patch16_dinov3_qkvb",  # SwiGLU with separate weights, aligned, biases of q and v
    "eva02_tiny_patch14_224",  # rotary pairs, rescaled positions
    "eva02_base_patch16_clip_224",  # separate q, k and v, norms inside
    "vit_small_patch16_rope_mixed_ape_224",  # learned rotations of each head and layer
    "vit_pe_core_tiny_patch16_384",  # attention pooling over the prefix too, heads of its own
    "vit_pe_lang_large_patch14_448",  # no final norm
]


def assert_matches_timm(name, **overrides):
    reference, model = pair(name, **overrides)
    images, d_logits = batch(model)
    assert_same(run(model, images, d_logits), run(reference, images, d_logits))


@pytest.mark.parametrize("name", KINDS)
def test_fp32_matches_timm(name):
    assert_matches_timm(name, **small(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_fp32_matches_timm_every_name(name):
    heads = 8 if name == "vit_7b_patch16_dinov3" else None  # whole, two blocks of it and timm's with gradients are 6 GB
    assert_matches_timm(name, **small(name, heads=heads))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_base_patch16_224", "deit3_base_patch16_224", "vit_base_patch16_siglip_224"],
)
def test_fp32_matches_timm_full_size(name):
    assert_matches_timm(name, num_classes=1000)


ALSO_BF16 = ["vit_small_plus_patch16_dinov3_qkvb", "eva02_base_patch16_clip_224"]
BF16_KINDS = [
    *KINDS[:1],
    *KINDS[3:11],
    *ALSO_BF16,
    *[pytest.param(name, marks=pytest.mark.slow) for name in KINDS[11:] if name not in ALSO_BF16],
]


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("name", BF16_KINDS)
def test_bf16_is_as_near_fp64_as_timm(name, autocast):
    reference, model = pair(name, **{**small(name), "num_classes": 100})
    images, d_logits = batch(model, size=16)  # 1600 logits: the ratio of two errors then scatters by some 5 %
    truth = run(copy.deepcopy(reference).double(), images.double(), d_logits.double())
    if not autocast:
        reference, model, images = reference.bfloat16(), model.bfloat16(), images.bfloat16()
    theirs, ours = run(reference, images, d_logits, autocast), run(model, images, d_logits, autocast)
    assert rel(ours[0], truth[0]) <= 1.2 * rel(theirs[0], truth[0])  # the project's bar for bf16
    assert rel(flat(ours[1]), flat(truth[1])) <= 1.2 * rel(flat(theirs[1]), flat(truth[1]))


@pytest.mark.parametrize("name", UNNAMED_IN_TIMM)
def test_sizes_that_timm_has_no_name_for(name):
    """timm's own class, built for patch 32 from its patch-16 name."""
    reference = timm.create_model("vit_tiny_patch16_224", patch_size=32, img_size=UNNAMED_IN_TIMM[name]).eval()
    model = vitfast.create_model(name).eval()
    model.load_state_dict(reference.state_dict())
    images, _ = batch(model)
    with torch.no_grad():
        assert rel(model(images), reference(images)) <= 1e-5


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_table_row_is_timms(name):
    with torch.device("meta"):
        reference = timm.create_model(name, num_classes=1000)
        model = vitfast.create_model(name)
    theirs = [(key, tuple(value.shape)) for key, value in reference.state_dict().items()]
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == theirs  # in timm's order too
    config, fed = CONFIGS[name], reference.pretrained_cfg
    assert config.num_heads == reference.blocks[0].attn.num_heads
    assert config.norm_eps == reference.blocks[0].norm1.eps
    assert (3, *config.image_hw) == fed["input_size"]
    for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation"):
        assert getattr(config, key) == fed[key], key


@pytest.mark.parametrize("recompute", ["fused", "block"])
def test_compiles_to_one_graph(recompute):
    name = "deit3_small_patch16_224"
    model = vitfast.create_model(name, **small(name), recompute=recompute, drop_path_rate=0.3)
    shake(model)
    images, d_logits = batch(model, size=4)
    torch.manual_seed(3)
    wanted_logits, wanted_grads = run(model, images, d_logits)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # the graphs of a real compile, uncompiled
    torch.manual_seed(3)
    model.zero_grad()
    logits = compiled(images)
    logits.backward(d_logits)
    assert rel(logits, wanted_logits) <= 1e-6
    assert rel(flat({key: p.grad for key, p in model.named_parameters()}), flat(wanted_grads)) <= 1e-6


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_backend_reaches_every_layer(name):
    model = vitfast.create_model(name, **small(name), backend="torch")
    layers = [module for module in model.modules() if hasattr(module, "backend")]
    assert {type(layer).__name__ for layer in layers} >= {"PatchEmbed", "LayerNorm", "Attention", "Mlp", "Block"}
    assert {layer.backend for layer in layers} == {"torch"}


def test_grad_checkpointing_switch_is_recompute_block():
    model = vitfast.create_model("vit_tiny_patch16_224", recompute="mlp", depth=1)
    model.set_grad_checkpointing()
    assert model.recompute == "block"
    model.set_grad_checkpointing(False)
    assert model.recompute == "mlp"


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_path_rate": 0.4},
        {"proj_drop_rate": 0.1},
        {"pos_drop_rate": 0.1, "drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.3},
    ],
    ids=["drop_path", "proj_drop", "all"],
)
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_tiny_patch16_224"])
def test_dropout_draws_as_timm(name, rates):
    reference, model = pair(name, **small(name), **rates)
    images, d_logits = batch(model, size=6)
    torch.manual_seed(4)
    wanted_logits, wanted_grads = run(reference, images, d_logits)
    torch.manual_seed(4)
    logits, grads = run(model, images, d_logits)
    assert rel(logits, wanted_logits) <= 1e-5
    assert rel(flat(grads), flat(wanted_grads)) <= 1e-5
    model.eval()
    reference.eval()
    assert rel(model(images), reference(images)) <= 1e-5
    assert rel(model(images), logits) > 1e-2  # it did drop something


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    model = vitfast.create_model("vit_tiny_patch16_224", **small("vit_tiny_patch16_224", 3), drop_path_rate=0.5)
    assert [block.drop_path1.drop_prob for block in model.blocks] == [0.0, 0.25, 0.5]
    torch.manual_seed(8)
    drop_path = model.blocks[2].drop_path1
    factor = drop_path.sample(torch.empty(4096, 1, dtype=torch.bfloat16))
    assert factor.dtype == torch.float32
    assert set(factor.tolist()) == {0.0, 2.0}
    assert abs(factor.mean().item() - 1) < 0.08  # 5 sigma of 4096 draws
    dropped = drop_path(torch.ones(64, 3, 2))
    assert all(len(sample.unique()) == 1 for sample in dropped)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_pooling_matches_timm(pool):
    overrides = dict(small("vit_tiny_patch16_224"), global_pool=pool)
    reference, model = pair("vit_tiny_patch16_224", **overrides)
    images, _ = batch(model)
    assert model(images).shape == ((2, 17, 10) if pool == "" else (2, 10))
    assert rel(model(images), reference(images)) <= 1e-5


@pytest.mark.parametrize("overrides", [{"num_classes": 0}, {"in_chans": 1}, {"in_chans": 5}, {"img_size": (32, 80)}])
def test_shape_overrides_match_timm(overrides):
    overrides = {**small("vit_tiny_patch16_224"), **overrides}
    reference, model = pair("vit_tiny_patch16_224", **overrides)
    images, _ = batch(model)
    logits = model(images)
    assert logits.shape == (2, overrides["num_classes"] or 128)
    assert rel(logits, reference(images)) <= 1e-5


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]
)
@pytest.mark.parametrize("options", [{}, {"indices": 1}, {"indices": [0, -1], "norm": True, "output_fmt": "NLC"}])
def test_intermediates_match_timm(name, options):
    reference, model = pair(name, **small(name))
    images, _ = batch(model)
    final, maps = model.forward_intermediates(images, **options)
    wanted_final, wanted_maps = reference.forward_intermediates(images, **options)
    assert rel(final, wanted_final) <= 1e-5
    assert len(maps) == len(wanted_maps)
    for value, wanted in zip(maps, wanted_maps, strict=True):
        assert value.shape == wanted.shape
        assert rel(value, wanted) <= 1e-5


def test_intermediate_layers_give_prefix_tokens_and_stop_early():
    name = "vit_small_patch14_reg4_dinov2"
    reference, model = pair(name, **small(name))
    images, _ = batch(model)
    options = {"reshape": True, "return_prefix_tokens": True}
    ((patches, prefix),) = model.get_intermediate_layers(images, [0], **options)
    ((wanted_patches, wanted_prefix),) = reference.get_intermediate_layers(images, [0], **options)
    assert prefix.shape == (2, 5, 128)
    assert rel(patches, wanted_patches) <= 1e-5
    assert rel(prefix, wanted_prefix) <= 1e-5
    ran = []
    model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    model.forward_intermediates(images, [0], stop_early=True, intermediates_only=True)
    assert ran == []


def test_normalize_takes_raw_pixels():
    options = small("deit_tiny_patch16_224")
    plain = vitfast.create_model("deit_tiny_patch16_224", **options)
    raw = vitfast.create_model("deit_tiny_patch16_224", normalize=True, **options)
    raw.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (plain.config.mean, plain.config.std))
    wanted = plain((pixels / 255 - mean) / std)
    assert rel(raw(pixels), wanted) <= 1e-5
    assert rel(raw(pixels / 255), wanted) <= 1e-5
    with pytest.raises(TypeError, match="normalize=True"):
        plain(pixels)


def test_normalize_averages_the_colours_for_other_channel_counts():
    model = vitfast.create_model("deit_tiny_patch16_224", normalize=True, in_chans=1, depth=1, img_size=16)
    assert model.patch_embed.mean == pytest.approx((0.449,))  # of 0.485, 0.456, 0.406
    assert model(torch.zeros(1, 1, 16, 16, dtype=torch.uint8)).shape == (1, 1000)


def test_reset_classifier():
    model = vitfast.create_model("vit_tiny_patch16_224", **small("vit_tiny_patch16_224"), representation_size=32)
    images, _ = batch(model)
    assert model.head.weight.shape == (10, 32)
    model.reset_classifier(7)
    assert model(images).tolist() == [[0.0] * 7] * 2  # zero-initialised, as the paper fine-tunes
    model.reset_classifier(0, "avg")
    assert torch.equal(model(images), model.forward_features(images)[:, 1:].mean(dim=1))
    with pytest.raises(ValueError, match="'map' cannot be added"):
        model.reset_classifier(7, "map")


def test_representation_layer_is_a_tanh_before_the_head():
    model = vitfast.create_model("vit_tiny_patch16_224", **small("vit_tiny_patch16_224"), representation_size=32)
    images, _ = batch(model)
    features = model.forward_features(images)
    hidden = torch.tanh(model.pre_logits.fc(features[:, 0]))
    assert torch.allclose(model.forward_head(features, pre_logits=True), hidden)
    torch.testing.assert_close(
        model(images), model.head(hidden), rtol=1e-5, atol=1e-6
    )  # one makes the last token alone


def test_initialisation_has_timms_statistics():
    torch.manual_seed(7)
    model = vitfast.create_model("deit3_small_patch16_224", depth=2)
    for weight in (model.blocks[0].mlp.fc1.weight, model.pos_embed, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert 0 < model.cls_token.abs().max().item() < 1e-5
    assert model.blocks[1].ls2.gamma.tolist() == pytest.approx([1e-6] * 384)
    assert all(not layer.bias.any() for layer in model.modules() if isinstance(layer, nn.Linear))
    pool = vitfast.create_model("vit_base_patch16_siglip_224", depth=1).attn_pool
    assert pool.latent.std().item() == pytest.approx(768**-0.5, rel=0.15)


@pytest.mark.parametrize("name", sorted(OURS_ONLY))
def test_small_models_train_every_parameter(name):
    model = vitfast.create_model(name, num_classes=10, in_chans=1)
    _, grads = run(model, *batch(model))
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grad.any() for grad in grads.values())


def test_copies_pickles_and_lives_on_meta():
    model = vitfast.create_model("vit_tiny_patch16_224", **small("vit_tiny_patch16_224"))
    images, _ = batch(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images))
    with torch.device("meta"):
        under_context = vitfast.create_model("vit_huge_patch14_224")
    by_keyword = vitfast.create_model("vit_huge_patch14_224", device="meta", dtype=torch.bfloat16)
    for meta in (under_context, by_keyword):
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        assert round(sum(p.numel() for p in meta.parameters()) / 1e6) == 632  # the paper's table 1
    assert by_keyword.head.weight.dtype == torch.bfloat16


def test_timm_optimizer_interface():
    from timm.optim import param_groups_layer_decay

    name = "vit_small_patch14_reg4_dinov2"
    reference, model = pair(name, **small(name))
    ours, theirs = (
        [
            (len(group["params"]), group["lr_scale"], group["weight_decay"])
            for group in param_groups_layer_decay(m, no_weight_decay_list=m.no_weight_decay())
        ]
        for m in (model, reference)
    )
    assert ours == theirs
    assert model.get_classifier() is model.head


def test_list_models():
    assert {"vit_base_patch16_224", "resnet18", "alexnet"} <= set(vitfast.list_models())
    assert vitfast.list_models("deit3_*_384") == [f"deit3_{size}_patch16_384" for size in ("base", "large", "small")]
    assert vitfast.list_models("nothing*") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"img_size": 225}, "multiple of the patch size 16, got 225"),
        ({"img_size": (224, 30)}, r"multiple of the patch size 16, got \(224, 30\)"),
        ({"img_size": 0}, "img_size must be an integer of at least 1, got 0"),
        ({"img_size": "224"}, "img_size must be .*got '224'"),
        ({"img_size": (224,)}, r"img_size must be .*got \(224,\)"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"in_chans": 0}, "in_chans must be an integer of at least 1"),
        ({"depth": 2.0}, "depth must be an integer of at least 1, got 2.0"),
        ({"backend": "fast"}, "backend must be one of 'auto', .*got 'fast'"),
        ({"recompute": "all"}, "recompute must be one of 'none', .*got 'all'"),
        ({"global_pool": "mean"}, "global_pool must be one of"),
        ({"class_token": False}, "global_pool='token' needs class_token=True"),
        ({"num_heads": 5}, "num_heads must divide embed_dim, got 5 and 192"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"activation": "relu"}, "activation must be one of 'gelu', 'gelu_tanh', 'quick_gelu', got 'relu'"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        vitfast.create_model("vit_tiny_patch16_224", **overrides)


def test_unknown_names_get_suggestions():
    with pytest.raises(ValueError, match=r"unknown model name 'vit_base_patch16_225'; nearest: vit_base_patch16_224"):
        vitfast.create_model("vit_base_patch16_225")
    with pytest.raises(TypeError, match=r"no override named dropout; allowed: .*proj_drop_rate"):
        vitfast.create_model("vit_tiny_patch16_224", dropout=0.1)


def test_bad_images_are_named():
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    with pytest.raises(ValueError, match=r"3 channels, got 1 .*in_chans=1"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"\(32, 32\) pixels .* got \(32, 48\)"):
        model(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\], got shape \(3, 32, 32\)"):
        model(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="indices must be between 1 and the number of blocks 1, got 2"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), 2)
    with pytest.raises(ValueError, match="output_fmt must be one of"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NHWC")
