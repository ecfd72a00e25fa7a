"""Weights of other projects load into our models and give the source model's numbers."""

import pickle

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import _load_weights

import vitfast
from vitfast.layers.resample import adapt_input_channels, resample_patch_embed, resample_pos_embed
from vitfast.models.checkpoints import find_weights, read_state_dict
from vitfast.models.weights import load_state_dict, save_weights

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "img_size": 32, "num_classes": 10}


def tiny(**overrides):
    return vitfast.create_model("vit_tiny_patch16_224", **{**TINY, **overrides}).eval()


def tiny_timm(**overrides):
    model = timm.create_model("vit_tiny_patch16_224", **{**TINY, **overrides})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model.eval()


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    return model.eval()


def images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def rel(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


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


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", "wrapped.pth"])
def test_timm_files_load_at_their_size_and_at_another(tmp_path, suffix):
    from safetensors.torch import save_file

    source = tiny_timm()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"model": source.state_dict(), "epoch": 3} if "wrapped" in suffix else source.state_dict(), path)
    assert rel(vitfast.load_pretrained(tiny(), path)(images()), source(images())) <= 1e-5
    source.set_input_size((48, 48))
    assert rel(vitfast.load_pretrained(tiny(img_size=48), path)(images(48)), source(images(48))) <= 1e-5


def test_our_state_dict_loads_into_timm():
    model, source = tiny(), tiny_timm()
    source.load_state_dict(model.state_dict(), strict=True)
    assert rel(source(images()), model(images())) <= 1e-5


@pytest.mark.parametrize("representation", [None, 24])
def test_torchvision_weights(tmp_path, representation):
    from torchvision.models.vision_transformer import VisionTransformer

    source = VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=10, representation_size=representation).eval()
    with torch.no_grad():
        for p in source.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = vitfast.load_pretrained(tiny(representation_size=representation), tmp_path / "vit.pth")
    assert rel(model(images()), source(images())) <= 1e-5


@pytest.mark.parametrize("names", ["transformers 5", "older"])
def test_hugging_face_weights(tmp_path, names):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=8,
        num_labels=10,
        initializer_range=0.1,
    )
    source = transformers.ViTForImageClassification(config).eval()
    state_dict = source.state_dict()
    if names == "older":  # as the published files are written
        new_to_old = {
            "vit.layers.": "vit.encoder.layer.",
            ".attention.q_proj.": ".attention.attention.query.",
            ".attention.k_proj.": ".attention.attention.key.",
            ".attention.v_proj.": ".attention.attention.value.",
            ".attention.o_proj.": ".attention.output.dense.",
            ".mlp.fc1.": ".intermediate.dense.",
            ".mlp.fc2.": ".output.dense.",
        }
        for new, old in new_to_old.items():
            state_dict = {key.replace(new, old): value for key, value in state_dict.items()}
    torch.save(state_dict, tmp_path / "vit.bin")
    model = vitfast.load_pretrained(tiny(norm_eps=1e-12), tmp_path / "vit.bin")
    assert rel(model(images()), source(images()).logits) <= 1e-5


def google_arrays(layout, pool="token", grid=4, dim=64, heads=4, hidden=256, depth=2, classes=10):
    """Random arrays in the shapes and names of Google's files; layout "vit" is the paper's, "big_vision" the later."""
    rng = np.random.default_rng(4)
    big_vision = layout == "big_vision"
    attention, norm2, mlp = ("0", "1", "0") if big_vision else ("1", "2", "3")
    arrays = {}

    def add(name, *shape):
        arrays[name] = rng.normal(0, 0.1, shape).astype(np.float32)

    def add_attention(stem):
        for part in ("query", "key", "value"):
            add(f"{stem}/{part}/kernel", dim, heads, dim // heads)
            add(f"{stem}/{part}/bias", heads, dim // heads)
        add(f"{stem}/out/kernel", heads, dim // heads, dim)
        add(f"{stem}/out/bias", dim)

    def add_norm(stem):
        add(f"{stem}/scale", dim)
        add(f"{stem}/bias", dim)

    def add_mlp(stem):
        add(f"{stem}/Dense_0/kernel", dim, hidden)
        add(f"{stem}/Dense_0/bias", hidden)
        add(f"{stem}/Dense_1/kernel", hidden, dim)
        add(f"{stem}/Dense_1/bias", dim)

    add("embedding/kernel", 8, 8, 3, dim)
    add("embedding/bias", dim)
    if pool == "token":
        add("cls", 1, 1, dim)
    positions = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    add(positions, 1, grid * grid + (pool == "token"), dim)
    for i in range(depth):
        stem = f"Transformer/encoderblock_{i}"
        add_norm(f"{stem}/LayerNorm_0")
        add_attention(f"{stem}/MultiHeadDotProductAttention_{attention}")
        add_norm(f"{stem}/LayerNorm_{norm2}")
        add_mlp(f"{stem}/MlpBlock_{mlp}")
    add_norm("Transformer/encoder_norm")
    if pool == "map":
        add("MAPHead_0/probe", 1, 1, dim)
        add_attention("MAPHead_0/MultiHeadDotProductAttention_0")
        add_norm("MAPHead_0/LayerNorm_0")
        add_mlp("MAPHead_0/MlpBlock_0")
    add("head/kernel", dim, classes)
    add("head/bias", classes)
    return {f"params/{name}" if big_vision else name: array for name, array in arrays.items()}


@pytest.mark.parametrize("img_size", [32, 48])
@pytest.mark.parametrize(("layout", "pool"), [("vit", "token"), ("big_vision", "token"), ("big_vision", "map")])
def test_google_npz_is_read_as_timm_reads_it(tmp_path, layout, pool, img_size):
    path = tmp_path / "weights.npz"
    np.savez(path, **google_arrays(layout, pool))
    overrides = {"img_size": img_size, "global_pool": pool, "class_token": pool == "token"}
    source = tiny_timm(**overrides)
    _load_weights(source, str(path))
    model = vitfast.load_pretrained(tiny(**overrides), path)
    for key, value in source.state_dict().items():
        assert rel(model.state_dict()[key], value) <= 1e-6, key
    assert rel(model(images(img_size)), source(images(img_size))) <= 1e-5


def test_google_npz_with_a_tanh_layer(tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = google_arrays("vit")
    arrays["pre_logits/kernel"] = np.ones((64, 64), np.float32)
    arrays["pre_logits/bias"] = np.ones(64, np.float32)
    np.savez(tmp_path / "weights.npz", **arrays)
    without = vitfast.load_pretrained(tiny(), tmp_path / "weights.npz")
    assert not without.head.weight.any()  # a head behind a tanh layer means nothing without it
    assert "new zero-initialised head for 10 classes; the file has one of 10 classes behind a tanh" in caplog.text
    model = vitfast.load_pretrained(tiny(representation_size=64), tmp_path / "weights.npz")
    assert model.pre_logits.fc.weight.eq(1).all()


def test_misfits_are_named_and_change_nothing():
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state_dict = {key: torch.zeros_like(value) for key, value in before.items()}
    del state_dict["norm.bias"]
    state_dict["extra"] = torch.zeros(1)
    state_dict["head.weight"] = torch.zeros(1000, 64)
    with pytest.raises(ValueError, match="does not fit") as raised:
        load_state_dict(model, state_dict)
    assert str(raised.value) == (
        "the state dict does not fit VisionTransformer: 1 missing: norm.bias; 1 unexpected: extra;"
        " 1 of another shape: head.weight (file (1000, 64), model (10, 64))"
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    deeper = tiny(depth=4)
    with pytest.raises(ValueError, match=r"24 missing: blocks\.2\.norm1\.weight, .* and 19 more"):
        load_state_dict(deeper, before)


class Explosive:
    """Runs code when it is unpickled by a careless reader."""

    def __reduce__(self):
        return (pytest.fail, ("a weight file ran code",))


def test_unreadable_and_unsafe_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        vitfast.load_pretrained(tiny(), tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        vitfast.load_pretrained(tiny(), tmp_path / "absent.npz")
    for name in ("noise.pth", "noise.safetensors", "noise.npz"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="cannot be read as"):
            vitfast.load_pretrained(tiny(), tmp_path / name)
    torch.save({"model": Explosive()}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="only tensors are accepted"):
        vitfast.load_pretrained(tiny(), tmp_path / "unsafe.pth")
    np.savez(tmp_path / "unsafe.npz", a=np.array(pickle.dumps(Explosive()), dtype=object))
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        vitfast.load_pretrained(tiny(), tmp_path / "unsafe.npz")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        vitfast.load_pretrained(tiny(), tmp_path / "other.pth")


def test_prefixes_of_wrappers_are_removed(tmp_path):
    model = tiny()
    wrapped = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "ddp.pth")
    assert list(read_state_dict(tmp_path / "ddp.pth")) == list(model.state_dict())


# Resampling


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


# timm's files into other models


def timm_file(path, model):
    torch.save(model.state_dict(), path)
    return path


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


def test_a_name_creates_the_model_with_the_files_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    overrides = {key: value for key, value in TINY.items() if key != "num_classes"}
    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    model = vitfast.load_pretrained("vit_tiny_patch16_224", path, **overrides).eval()
    assert model.num_classes == 10
    assert rel(model(images()), source(images())) <= 1e-5
    assert caplog.text == ""
    other = vitfast.load_pretrained("vit_tiny_patch16_224", path, **overrides, num_classes=3)
    assert not other.head.weight.any()
    assert "new zero-initialised head for 3 classes; the file has one of 10 classes" in caplog.text
    assert rel(other.forward_features(images()), source.forward_features(images())) <= 1e-5
    features = vitfast.load_pretrained("vit_tiny_patch16_224", path, **overrides, num_classes=0).eval()
    assert rel(features(images()), source.forward_features(images())[:, 0]) <= 1e-5
    assert "head left out" in caplog.text


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


EVA_TINY = {"depth": 2, "embed_dim": 64, "num_heads": 4, "patch_size": 8, "img_size": 32, "num_classes": 10}


@pytest.mark.parametrize("there", ["fused", "split_bias", "separate"])
@pytest.mark.parametrize("here", ["fused", "split_bias", "separate"])
def test_layouts_of_q_k_and_v_convert(tmp_path, there, here):
    gated = {"fused": "swiglu_packed", "split_bias": "swiglu_packed", "separate": "swiglu"}
    source, model = (
        shaken(
            vitfast.create_model(
                "eva02_tiny_patch14_224",
                **EVA_TINY,
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


# transformers


HF = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}
SMALL = {key: value for key, value in TINY.items() if key != "num_classes"}


def hugging_face(kind):
    """A random model of transformers, a name and options of ours, and what to compare."""
    transformers = pytest.importorskip("transformers", minversion="5")
    mlp = {"intermediate_size": 256}
    make = lambda model, config, **options: getattr(transformers, model)(  # noqa: E731
        getattr(transformers, config)(**HF, **options)
    )
    features = {"num_classes": 0}
    if kind == "mae":
        return make("ViTMAEModel", "ViTMAEConfig", **mlp, mask_ratio=0.0), "vit_tiny_patch16_224", {"norm_eps": 1e-12}
    if kind == "dinov2":
        return make("Dinov2Model", "Dinov2Config"), "vit_small_patch14_dinov2", features
    if kind == "dinov2 swiglu":
        options = {"mlp_ratio": 176 / 64, **features}
        return make("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True), "vit_giant_patch14_dinov2", options
    if kind == "dinov2 registers":
        model = make("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
        return model, "vit_small_patch14_reg4_dinov2", features
    if kind == "dinov3":
        model = make("DINOv3ViTModel", "DINOv3ViTConfig", **mlp, num_register_tokens=4)
        return model, "vit_small_patch16_dinov3_qkvb", features
    if kind == "dinov3 gated":
        no_bias = {"query_bias": False, "value_bias": False}
        model = make(
            "DINOv3ViTModel",
            "DINOv3ViTConfig",
            **mlp,
            num_register_tokens=4,
            hidden_act="silu",
            use_gated_mlp=True,
            **no_bias,
        )
        return model, "vit_small_plus_patch16_dinov3", features
    if kind == "siglip":
        model = make("SiglipVisionModel", "SiglipVisionConfig", **mlp, hidden_act="gelu_pytorch_tanh")
        return model, "vit_base_patch16_siglip_224", {"activation": "gelu_tanh", **features}
    model = make("CLIPVisionModelWithProjection", "CLIPVisionConfig", **mlp, projection_dim=10)
    return model, "vit_base_patch32_clip_quickgelu_224", {}


@pytest.mark.parametrize(
    "kind",
    ["mae", "dinov2", "dinov2 swiglu", "dinov2 registers", "dinov3", "dinov3 gated", "siglip", "clip"],
)
def test_transformers_models(tmp_path, kind):
    source, name, options = hugging_face(kind)
    source = shaken(source)
    source.save_pretrained(tmp_path)  # as published files are written
    model = vitfast.load_pretrained(name, tmp_path, **SMALL, **options).eval()
    with torch.no_grad():
        theirs = source(images())
        if kind == "clip":
            assert rel(model(images()), theirs.image_embeds) <= 1e-5
        elif kind == "siglip":
            assert rel(model(images()), theirs.pooler_output) <= 1e-5
        elif kind == "mae":  # its encoder shuffles patches
            assert set(model.state_dict()) == set(tiny(num_classes=0).state_dict())
            assert torch.equal(model.blocks[1].attn.qkv.weight[:64], source.layers[1].attention.q_proj.weight)
        else:
            assert rel(model.forward_features(images()), theirs.last_hidden_state) <= 1e-5


# The original releases


def test_dinov2_and_dinov3_as_released(tmp_path):
    model = shaken(vitfast.create_model("vit_giant_patch14_reg4_dinov2", **{**SMALL, "num_classes": 0}))
    weights = {
        key.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): v for key, v in model.state_dict().items()
    }
    weights["register_tokens"] = weights.pop("reg_token")
    weights["pos_embed"] = torch.cat([torch.zeros(1, 1, 64), weights["pos_embed"]], dim=1)
    weights["mask_token"] = torch.ones(1, 64)
    torch.save(weights, tmp_path / "dinov2.pth")
    loaded = vitfast.load_pretrained("vit_giant_patch14_reg4_dinov2", tmp_path / "dinov2.pth", **SMALL).eval()
    assert rel(loaded(images()), model(images())) <= 1e-5

    model = shaken(vitfast.create_model("vit_small_patch16_dinov3_qkvb", **{**SMALL, "num_classes": 0}))
    weights = {}
    for key, value in model.state_dict().items():
        if key.endswith("attn.q_bias"):
            v_bias = model.state_dict()[key.replace("q_bias", "v_bias")]
            weights[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.zeros(64), v_bias])
            weights[key.replace("q_bias", "qkv.bias_mask")] = torch.ones(192)
        elif not key.endswith("attn.v_bias"):
            key = (
                key.replace("reg_token", "storage_tokens")
                .replace("gamma_1", "ls1.gamma")
                .replace("gamma_2", "ls2.gamma")
            )
            weights[key] = value
    weights |= {"rope_embed.periods": torch.ones(16), "mask_token": torch.ones(1, 64)}
    torch.save({"model": weights}, tmp_path / "dinov3.pth")
    loaded = vitfast.load_pretrained("vit_small_patch16_dinov3_qkvb", tmp_path / "dinov3.pth", **SMALL).eval()
    assert rel(loaded(images()), model(images())) <= 1e-5


def test_google_npz_of_all_layers_in_one(tmp_path):
    arrays = google_arrays("big_vision", "map")
    stem = "params/Transformer/encoderblock"
    parts = {key.split("encoderblock_0/")[1] for key in arrays if "encoderblock_0/" in key}
    scanned = {key: value for key, value in arrays.items() if "encoderblock_" not in key}
    scanned |= {f"{stem}/{part}": np.stack([arrays[f"{stem}_{i}/{part}"] for i in range(2)]) for part in parts}
    np.savez(tmp_path / "single.npz", **arrays)
    np.savez(tmp_path / "scanned.npz", **scanned)
    overrides = {"global_pool": "map", "class_token": False}
    single, stacked = (
        vitfast.load_pretrained(tiny(**overrides), tmp_path / f"{name}.npz").state_dict()
        for name in ("single", "scanned")
    )
    assert all(torch.equal(value, stacked[key]) for key, value in single.items())


def test_google_hybrids_are_refused_with_the_reason(tmp_path):
    np.savez(
        tmp_path / "hybrid.npz", **google_arrays("vit"), **{"conv_root/kernel": np.zeros((7, 7, 3, 64), np.float32)}
    )
    with pytest.raises(ValueError, match="this is a hybrid: a ResNet before the transformer"):
        vitfast.load_pretrained(tiny(), tmp_path / "hybrid.npz")


# Files, folders, the hub


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_is_saved_loads_into_timm(tmp_path, name, suffix):
    model = shaken(vitfast.create_model(name, **TINY))
    save_weights(model, tmp_path / f"weights{suffix}")
    source = timm.create_model(name, **TINY).eval()
    source.load_state_dict(read_state_dict(tmp_path / f"weights{suffix}"), strict=True)
    assert rel(source(images()), model(images())) <= 1e-5
    again = vitfast.load_pretrained(name, tmp_path / f"weights{suffix}", **SMALL).eval()
    assert torch.equal(again(images()), model(images()))
    with pytest.raises(ValueError, match="no tanh layer"):
        save_weights(tiny(representation_size=8), tmp_path / "weights.pth")


def test_shards_in_a_folder(tmp_path):
    import json

    from safetensors.torch import save_file

    source = tiny_timm()
    weights = source.state_dict()
    keys = list(weights)
    shards = {"model-1.safetensors": keys[:9], "model-2.safetensors": keys[9:]}
    for file, part in shards.items():
        save_file({key: weights[key] for key in part}, tmp_path / file)
    index = {"weight_map": {key: file for file, part in shards.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert rel(vitfast.load_pretrained(tiny(), tmp_path)(images()), source(images())) <= 1e-5
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no weight file in .*empty; looked for model\.safetensors"):
        vitfast.load_pretrained(tiny(), tmp_path / "empty")


def test_the_hub_is_asked_by_name(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = timm_file(tmp_path / "pytorch_model.bin", tiny_timm())
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if name != "pytorch_model.bin":
            raise EntryNotFoundError("404")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert find_weights("hf-hub:timm/vit_tiny.augreg@main") == [path]
    assert asked[0] == ("timm/vit_tiny.augreg", "model.safetensors", "main")
    assert vitfast.load_pretrained(tiny(), "timm/vit_tiny.augreg") is not None

    def offline(*_args, **_options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"could not be downloaded from the Hugging Face hub .*give the file"):
        vitfast.load_pretrained(tiny(), "timm/vit_tiny.augreg")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match="huggingface_hub is not installed"):
        vitfast.load_pretrained(tiny(), "timm/vit_tiny.augreg")


def test_a_meta_model_takes_the_files_tensors(tmp_path):
    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    with torch.device("meta"):
        model = vitfast.create_model("vit_tiny_patch16_224", **TINY).eval()
    assert rel(vitfast.load_pretrained(model, path)(images()), source(images())) <= 1e-5


def test_other_architectures_are_named_and_change_nothing(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"does not fit VisionTransformer: 32 missing: cls_token, .*unexpected: conv1\.w"
    ):
        vitfast.load_pretrained(model, tmp_path / "resnet.pth")
    path = timm_file(tmp_path / "wider.pth", tiny_timm(embed_dim=128))
    with pytest.raises(ValueError, match=r"of another shape: cls_token \(file \(1, 1, 128\), model \(1, 1, 64\)\)"):
        vitfast.load_pretrained(model, path)
    path = timm_file(tmp_path / "deeper.pth", tiny_timm(depth=3))
    with pytest.raises(ValueError, match=r"12 unexpected: blocks\.2\."):
        vitfast.load_pretrained(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"takes a Vision Transformer of vitfast.create_model, got ResNet"):
        vitfast.load_pretrained(torchvision.models.resnet18(), path)
    with pytest.raises(TypeError, match=r"options \(num_classes\) are for a name"):
        vitfast.load_pretrained(model, path, num_classes=3)
