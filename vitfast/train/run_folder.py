"""The run folder: what is in it, and making it ready for a new or a resumed run."""

import shutil
from pathlib import Path

BEST, LAST, METRICS, CURVES, CONFIG = "best.pt", "last.pt", "metrics.jsonl", "curves.png", "config.json"


def prepare(folder: Path, *, overwrite: bool) -> None:
    """Make an empty run folder. An earlier run in it is an error, or with `overwrite` its files are removed."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"run folder {folder} is a file")
    earlier = [folder / name for name in (LAST, BEST, METRICS, CURVES, CONFIG) if (folder / name).exists()]
    if earlier and not overwrite:
        raise FileExistsError(
            f"{folder} already holds a run; go on with it (--resume auto), replace it (--overwrite) or use another --out"
        )
    for path in earlier:
        path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def carry_over(source: Path, folder: Path) -> None:
    """A run resumed into another folder takes its metrics and its best checkpoint along."""
    if source.resolve() == folder.resolve():
        return
    prepare(folder, overwrite=False)
    for name in (METRICS, BEST):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
