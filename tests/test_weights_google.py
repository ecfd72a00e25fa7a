"""Google's .npz files are read as timm reads them."""

import numpy as np
import pytest
import torch
from model_checks import rel
from timm.models.vision_transformer import _load_weights
from weights_checks import images, tiny, tiny_timm

import vitfast


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
