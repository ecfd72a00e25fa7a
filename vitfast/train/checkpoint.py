"""Checkpoints: saved so that a failure leaves the previous one whole, loaded without running any code from the file.

A checkpoint is one torch.save file of tensors and plain values:
    format, version, vitfast   what wrote it
    model                      {"name", "kwargs"} for vitfast.create_model
    data                       DatasetInfo.to_dict(), with image_size the size the model takes
    config                     TrainConfig.to_dict()
    progress                   epoch, step, best accuracy, running sums
    weights, ema               state dicts; ema (or None) is what evaluation uses
    training                   optimizer, scaler and random-number states; None in best.pt
"""

import os
import pickle
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import vitfast
from vitfast.train.data import DatasetInfo

FORMAT = "vitfast-checkpoint"
VERSION = 1
_KEYS = ("model", "data", "config", "progress", "weights", "ema", "training")


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, read or used; the message names the file."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write beside, flush to disk, rename. On any failure the file at `path` stays as it was and no partial file is left."""
    assert set(content) == set(_KEYS), content.keys()
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    header = {"format": FORMAT, "version": VERSION, "vitfast": vitfast.__version__}
    try:
        with open(partial, "wb") as file:
            torch.save(header | content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch turns a failed write into a RuntimeError with the OSError as its context
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        kept = "the previous checkpoint there is intact" if path.exists() else "there was no earlier checkpoint there"
        raise CheckpointError(f"could not save checkpoint {path}: {reason}; {kept}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where folders can be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> Any:
    """What a .safetensors or torch.save file holds, tensors on the CPU; never executes code from it.

    Raises CheckpointError naming a file that is missing, damaged, or holds other things than tensors and plain values.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
        with warnings.catch_warnings():  # torch remarks on foreign pickles; the error below says more
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text recommends to load it unsafely: not repeated here
        raise CheckpointError(
            f"{path} is no checkpoint, or holds more than tensors and plain values, and is not loaded for safety"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged, incomplete or no checkpoint: {first_line}") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that vitfast saved. Raises CheckpointError for anything else."""
    path = Path(path)
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a vitfast checkpoint (one that `vitfast train` saved)")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}; this vitfast reads version {VERSION}"
        )
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return content


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin: str | Path) -> None:
    """load_state_dict with errors that list missing, unexpected and misshapen keys, a few of each."""
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": [
            f"{key} ({list(weights[key].shape)} for {list(own[key].shape)})"
            for key in own
            if key in weights and weights[key].shape != own[key].shape
        ],
    }
    told = [f"{kind}: {_few(keys)}" for kind, keys in problems.items() if keys]
    if told:
        raise CheckpointError(f"{origin} does not fit {type(model).__name__}; " + "; ".join(told))
    model.load_state_dict(weights)


def _few(keys: list[str], shown: int = 5) -> str:
    return ", ".join(keys[:shown]) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")


def load_model(
    path: str | Path, *, device: torch.device | str = "cpu", backend: str = "auto"
) -> tuple[nn.Module, DatasetInfo, dict[str, Any]]:
    """The trained model in eval mode (its moving average where there is one), its dataset's description, the checkpoint."""
    content = load_checkpoint(path)
    spec = content["model"]
    model = vitfast.create_model(spec["name"], **(spec["kwargs"] | {"backend": backend}))
    load_weights(model, content["ema"]["weights"] if content["ema"] else content["weights"], path)
    return model.to(device).eval(), DatasetInfo.from_dict(content["data"]), content


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators as tensors and plain values."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = numpy_state
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of random_state. CUDA's part is set where the number of GPUs is the same."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
