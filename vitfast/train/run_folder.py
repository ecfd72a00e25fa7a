"""The run folder: what is in it, and making it ready for a new or a resumed run."""

import shutil
from pathlib import Path

BEST, LAST, METRICS, CURVES, CONFIG = "best.pt", "last.pt", "metrics.jsonl", "curves.png", "config.json"
_FILES = (LAST, BEST, METRICS, CURVES, CONFIG)


def check(folder: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError when an earlier run is in the folder and may not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"run folder {folder} is a file")
    if not overwrite and any((folder / name).exists() for name in _FILES):
        raise FileExistsError(
            f"{folder} already holds a run; go on with it (--resume auto), replace it (--overwrite) or use another --out"
        )


def clear(folder: Path) -> None:
    """Make the folder, without an earlier run's files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def carry_over(source: Path, folder: Path) -> None:
    """A run resumed into another folder takes its metrics and its best checkpoint along."""
    if source.resolve() == folder.resolve():
        return
    check(folder, overwrite=False)
    clear(folder)
    for name in (METRICS, BEST):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
