"""Weight files wherever they are: wrapped, in shards, on the hub; unreadable and unsafe ones are refused."""

import pickle

import numpy as np
import pytest
import torch
from model_checks import rel
from weights_checks import images, timm_file, tiny, tiny_timm

import vitfast
from vitfast.models.checkpoints import find_weights, read_state_dict


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
