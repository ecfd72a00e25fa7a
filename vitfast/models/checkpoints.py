"""Weight files: where they are and what they hold, read without ever running code from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What a folder or a repository of the hub may hold, in order of preference.
FILE_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_REPOSITORY = re.compile(r"(?:hf[-_]hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def find_weights(source: str | Path) -> list[Path]:
    """The files of a source: a weight file, a folder with one of ``FILE_NAMES``, or a repository of the Hugging Face hub.

    A repository is "owner/name", optionally "hf-hub:owner/name" and "...@revision"; it is downloaded into the hub's own
    cache. Raises FileNotFoundError for a path that is not there, RuntimeError where the hub cannot be reached (offline,
    no such repository) or huggingface_hub is not installed; both say what to do.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _parts(lambda name: path / name if (path / name).is_file() else None, str(path))
    match = _REPOSITORY.fullmatch(str(source))
    if match is None or path.suffix in (".npz", ".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
        raise FileNotFoundError(f"no weight file at {path}")
    repository, revision = match.groups()
    return _parts(lambda name: _download(repository, name, revision), f"the hub's {repository}")


def _parts(locate: Any, where: str) -> list[Path]:
    for name in FILE_NAMES:
        found = locate(name)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return [found]
        shards = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
        return [locate(shard) for shard in shards]
    raise FileNotFoundError(f"no weight file in {where}; looked for {', '.join(FILE_NAMES)}")


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    """One file of a repository in the local cache; None where the repository has no such file."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise RuntimeError(
            f"{repository} is not a local file, and huggingface_hub is not installed to download it;"
            " install it, or give a local file"
        ) from error
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:  # offline and not in the cache; also an EntryNotFoundError
        raise RuntimeError(_unreachable(repository, error)) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # no such repository, no permission, no network: many kinds
        raise RuntimeError(_unreachable(repository, error)) from error


def _unreachable(repository: str, error: Exception) -> str:
    return (
        f"{repository} is not a local file, and could not be downloaded from the Hugging Face hub"
        f" ({type(error).__name__}: {error}); download it where there is a connection, and give the file"
    )


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` or PyTorch file on the CPU, unwrapped from "state_dict" or "model".

    Never runs code from the file. Raises ValueError when it cannot be read that way, FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt archives and refused pickles raise many kinds
        raise ValueError(f"{path} cannot be read as weights (only tensors are accepted): {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict: a mapping from names to tensors, bare or under 'state_dict'")
    return {re.sub(r"^(?:module\.|_orig_mod\.)+", "", key): tensor for key, tensor in content.items()}


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of an ``.npz`` file; raises ValueError when it is not one, FileNotFoundError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}")
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an .npz file of arrays: {error}") from error
