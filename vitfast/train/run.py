"""fit(): settle the settings, make the run folder ready, train."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitfast.train import checkpoint as ckpt
from vitfast.train import run_folder
from vitfast.train.config import TrainConfig, locked_differences
from vitfast.train.engine import FitResult, Trainer
from vitfast.train.progress import Reporter, default_reporter
from vitfast.train.recipes import recipe_config
from vitfast.train.signals import StopRequest


def fit(
    config: TrainConfig | None = None,
    *,
    recipe: str | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    download: bool = False,
    on_step: Callable[[int], None] | None = None,
    reporter: Reporter | None = None,
    **overrides: Any,
) -> FitResult:
    """Train a model and return how well it does; checkpoints, metrics and curves go to the run folder.

    Give a TrainConfig, or a recipe's name and fields of TrainConfig to override: fit(recipe="digits-vit", epochs=5).
    resume: a checkpoint, or "auto" for last.pt of the run folder if there is one. Its settings are used; overrides that
    would change the outcome raise ValueError. overwrite: replace an earlier run in the folder. download: let torchvision
    fetch a missing dataset. on_step(step) is called after every optimizer step.

    Raises ValueError or OSError for bad settings and data, TrainingError when the loss is no longer finite (last.pt is
    kept), Interrupted on Ctrl-C (last.pt is saved first), CheckpointError for a file that cannot be saved or used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise NotImplementedError(
            f"vitfast trains on one device so far; started with WORLD_SIZE={os.environ['WORLD_SIZE']} (torchrun). "
            "Run it with plain python"
        )
    if config is not None and (recipe is not None or overrides):
        given = ", ".join(([f"recipe={recipe!r}"] if recipe else []) + sorted(overrides))
        raise ValueError(f"give either a config or a recipe with overrides; got a config and {given}")
    reporter = reporter or default_reporter()
    config, saved = _resolve(config, recipe, resume, overrides)
    if saved is None:
        run_folder.check(config.run_folder, overwrite=overwrite)
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if config.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is deterministic only with a fixed workspace
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        with StopRequest() as stop, reporter:
            return Trainer(config, pick_device(config.device), saved, download, stop, reporter, on_step).run()
    finally:
        torch.use_deterministic_algorithms(flags[0])
        torch.backends.cudnn.benchmark = flags[1]


def _resolve(
    config: TrainConfig | None, recipe: str | None, resume: str | Path | None, overrides: dict[str, Any]
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The run's settings, and the checkpoint to go on from (None: a new run)."""
    wanted = config or recipe_config(recipe, overrides)
    if resume is None:
        return wanted, None
    path = wanted.run_folder / run_folder.LAST if str(resume) == "auto" else Path(resume)
    if str(resume) == "auto" and not path.exists():
        return wanted, None
    saved = ckpt.load_checkpoint(path)
    if saved["training"] is None:
        raise ckpt.CheckpointError(f"{path} holds weights only; resume from {path.with_name(run_folder.LAST)}")
    before = TrainConfig.from_dict(saved["config"])
    if config is None and recipe is None:
        wanted = replace(before, **overrides)
    changed = locked_differences(before, wanted)
    if changed:
        raise ValueError(f"a resumed run keeps its settings; {path} was saved with others: {'; '.join(changed)}")
    if wanted.out is None:
        wanted = replace(wanted, out=str(path.parent))
    run_folder.carry_over(path.parent, wanted.run_folder)
    return wanted, saved


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or the CPU. Raises ValueError for a device that torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not there; torch sees {torch.cuda.device_count()} GPUs")
    return device
