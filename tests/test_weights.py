"""Weights of timm and torchvision load into our models and give the source's numbers; what does not fit is named."""

import pytest
import timm
import torch
from model_checks import rel
from weights_checks import SMALL, TINY, images, shaken, timm_file, tiny, tiny_timm

import vitfast
from vitfast.models.checkpoints import read_state_dict
from vitfast.models.weights import load_state_dict, save_weights


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


@pytest.mark.parametrize("representation", [None, 24])
def test_torchvision_weights(tmp_path, representation):
    from torchvision.models.vision_transformer import VisionTransformer

    source = shaken(VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=10, representation_size=representation))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = vitfast.load_pretrained(tiny(representation_size=representation), tmp_path / "vit.pth")
    assert rel(model(images()), source(images())) <= 1e-5


def test_a_name_creates_the_model_with_the_files_classes(tmp_path, caplog):
    caplog.set_level("INFO")
    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    model = vitfast.load_pretrained("vit_tiny_patch16_224", path, **SMALL).eval()
    assert model.num_classes == 10
    assert rel(model(images()), source(images())) <= 1e-5
    assert caplog.text == ""
    other = vitfast.load_pretrained("vit_tiny_patch16_224", path, **SMALL, num_classes=3)
    assert not other.head.weight.any()
    assert "new zero-initialised head for 3 classes; the file has one of 10 classes" in caplog.text
    assert rel(other.forward_features(images()), source.forward_features(images())) <= 1e-5
    features = vitfast.load_pretrained("vit_tiny_patch16_224", path, **SMALL, num_classes=0).eval()
    assert rel(features(images()), source.forward_features(images())[:, 0]) <= 1e-5
    assert "head left out" in caplog.text


def test_a_meta_model_takes_the_files_tensors(tmp_path):
    source = tiny_timm()
    path = timm_file(tmp_path / "weights.pth", source)
    with torch.device("meta"):
        model = vitfast.create_model("vit_tiny_patch16_224", **TINY).eval()
    assert rel(vitfast.load_pretrained(model, path)(images()), source(images())) <= 1e-5


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
