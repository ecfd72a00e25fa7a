"""Weights of other projects load into our models and give the source model's numbers."""

import pickle

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import _load_weights

import vitfast
from vitfast.models.convert import load_state_dict, load_weights, read_state_dict, resample_pos_embed

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
    assert rel(load_weights(tiny(), path)(images()), source(images())) <= 1e-5
    source.set_input_size((48, 48))
    assert rel(load_weights(tiny(img_size=48), path)(images(48)), source(images(48))) <= 1e-5


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
    model = load_weights(tiny(representation_size=representation), tmp_path / "vit.pth")
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
    model = load_weights(tiny(norm_eps=1e-12), tmp_path / "vit.bin")
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
    model = load_weights(tiny(**overrides), path)
    for key, value in source.state_dict().items():
        assert rel(model.state_dict()[key], value) <= 1e-6, key
    assert rel(model(images(img_size)), source(images(img_size))) <= 1e-5


def test_google_npz_with_a_tanh_layer_needs_a_place_for_it(tmp_path):
    arrays = google_arrays("vit")
    arrays["pre_logits/kernel"] = np.ones((64, 64), np.float32)
    arrays["pre_logits/bias"] = np.ones(64, np.float32)
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(ValueError, match=r"2 unexpected: pre_logits\.fc\.weight, pre_logits\.fc\.bias"):
        load_weights(tiny(), tmp_path / "weights.npz")
    model = load_weights(tiny(representation_size=64), tmp_path / "weights.npz")
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
        load_weights(tiny(), tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="no weight file at"):
        load_weights(tiny(), tmp_path / "absent.npz")
    for name in ("noise.pth", "noise.safetensors", "noise.npz"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="cannot be read as"):
            load_weights(tiny(), tmp_path / name)
    torch.save({"model": Explosive()}, tmp_path / "unsafe.pth")
    with pytest.raises(ValueError, match="only tensors are accepted"):
        load_weights(tiny(), tmp_path / "unsafe.pth")
    np.savez(tmp_path / "unsafe.npz", a=np.array(pickle.dumps(Explosive()), dtype=object))
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        load_weights(tiny(), tmp_path / "unsafe.npz")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_weights(tiny(), tmp_path / "other.pth")


def test_prefixes_of_wrappers_are_removed(tmp_path):
    model = tiny()
    wrapped = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "ddp.pth")
    assert list(read_state_dict(tmp_path / "ddp.pth")) == list(model.state_dict())
