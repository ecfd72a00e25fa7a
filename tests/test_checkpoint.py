"""Checkpoints: what survives a failed save, and what happens to files that are no checkpoints."""

import errno
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitfast.train import checkpoint as ckpt
from vitfast.train.checkpoint import CheckpointError


def content(value: float = 1.0, size: int = 100) -> dict:
    return {
        "model": {"name": "m", "kwargs": {"num_classes": 2}},
        "data": {},
        "config": {},
        "progress": {"step": 3},
        "weights": {"w": torch.full((size,), value)},
        "ema": None,
        "training": None,
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_leaves_one_file(tmp_path):
    path = tmp_path / "last.pt"
    ckpt.save_checkpoint(path, content(1.0))
    ckpt.save_checkpoint(path, content(2.0))
    assert files(tmp_path) == ["last.pt"]
    assert ckpt.load_checkpoint(path)["weights"]["w"][0] == 2


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_disk_full_keeps_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    path = tmp_path / "last.pt"
    ckpt.save_checkpoint(path, content(1.0))
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(
        CheckpointError, match=r"last.pt: No space left on device; the previous checkpoint there is intact"
    ):
        ckpt.save_checkpoint(path, content(2.0))
    assert files(tmp_path) == ["last.pt"]
    assert path.read_bytes() == before


def test_a_write_that_really_fails_midway(tmp_path):
    """A child process whose files may not exceed 100 kB: the kernel refuses in the middle of torch.save."""
    path = tmp_path / "last.pt"
    ckpt.save_checkpoint(path, content(1.0))
    before = path.read_bytes()
    limit = 100_000
    program = (
        "import sys, torch; from pathlib import Path; from vitfast.train import checkpoint as ckpt\n"
        "new = ckpt.load_checkpoint(sys.argv[1]); new = {k: new[k] for k in ckpt._KEYS}\n"
        "new['weights'] = {'w': torch.zeros(100_000)}\n"
        "try: ckpt.save_checkpoint(Path(sys.argv[1]), new)\n"
        "except ckpt.CheckpointError as error: print(error)\n"
        "else: print('saved')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert (
        f"could not save checkpoint {path}: File too large; the previous checkpoint there is intact" in done.stdout
    ), done
    assert files(tmp_path) == ["last.pt"]
    assert path.read_bytes() == before


def test_first_save_into_a_missing_folder_says_there_was_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"No such file or directory; there was no earlier checkpoint"):
        ckpt.save_checkpoint(tmp_path / "nowhere" / "last.pt", content())


class Attack:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_never_run(tmp_path):
    trap = tmp_path / "trap"
    for name, save in (("torch.pt", torch.save), ("plain.pkl", lambda o, p: Path(p).write_bytes(pickle.dumps(o)))):
        save({"format": ckpt.FORMAT, "weights": Attack(trap)}, tmp_path / name)
        with pytest.raises(CheckpointError, match="not loaded for safety"):
            ckpt.load_checkpoint(tmp_path / name)
    assert not trap.exists()


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "last.pt"
    with pytest.raises(CheckpointError, match=f"no checkpoint {path}"):
        ckpt.load_checkpoint(path)
    ckpt.save_checkpoint(path, content(size=10_000))
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:5000], whole[:-30], whole[:300] + bytes(200) + whole[500:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"^{path} ") as caught:
            ckpt.load_checkpoint(path)
        assert "\n" not in str(caught.value)
    torch.save({"some": "model"}, path)
    with pytest.raises(CheckpointError, match="is not a vitfast checkpoint"):
        ckpt.load_checkpoint(path)
    torch.save({"format": ckpt.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="version 99; this vitfast reads version 1"):
        ckpt.load_checkpoint(path)
    torch.save({"format": ckpt.FORMAT, "version": 1, "model": {}}, path)
    with pytest.raises(CheckpointError, match="lacks data, config, progress, weights, ema, training"):
        ckpt.load_checkpoint(path)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="no safetensors file"):
        ckpt.load_checkpoint(broken)


def test_load_weights_lists_what_does_not_fit():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    weights = model.state_dict()
    del weights["0.bias"]
    weights["1.weight"] = torch.zeros(5, 3)
    weights |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    with pytest.raises(CheckpointError) as caught:
        ckpt.load_weights(model, weights, "file.pt")
    assert str(caught.value) == (
        "file.pt does not fit Sequential; missing: 0.bias; unexpected: extra.0, extra.1, extra.2, extra.3, extra.4 and 2 more; "
        "of another shape: 1.weight ([5, 3] for [4, 3])"
    )


def test_random_state_is_restored_through_a_file(tmp_path):
    import random

    np.random.randn(3)  # leaves a cached value behind, which is part of the state

    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()]

    torch.save(ckpt.random_state(), tmp_path / "state.pt")
    expected = draw()
    assert draw() != expected
    ckpt.set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected
