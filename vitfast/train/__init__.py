"""Training on real images: `fit` trains, `TrainConfig` and `RECIPES` say how, checkpoints resume to the bit.

    from vitfast.train import fit
    result = fit(recipe="digits-vit", out="runs/digits")
    print(result.test_accuracy, result.checkpoint)

Names are imported on first use, so that `vitfast train --help` does not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CheckpointError": "checkpoint",
    "DatasetInfo": "data",
    "FitResult": "engine",
    "Interrupted": "signals",
    "RECIPES": "recipes",
    "TrainConfig": "config",
    "TrainingError": "engine",
    "fit": "run",
    "keep_freed_memory": "memory",
    "load_checkpoint": "checkpoint",
    "load_dataset": "data",
    "load_model": "checkpoint",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitfast.train' has no attribute {name!r}")
    return getattr(import_module(f"vitfast.train.{_HOMES[name]}"), name)
