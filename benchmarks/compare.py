"""Is it slower than before? Against a saved result by ratios, against another commit by times taken in turn."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import schema
from .machine import name_of
from .schema import Row

SMALLEST_LOSS = 0.05  # a ratio that fell by less is no regression, however quiet the machine


@dataclass(frozen=True)
class Change:
    """One row now and before. ``worse``: the ratio fell by more than the noise of both runs."""

    row: Row
    before: Row
    worse: bool

    def __str__(self) -> str:
        now, then = self.row, self.before
        return (
            f"{' '.join(now.key)}: ratio {now.ratio:.2f} ({now.ratio_low:.2f}–{now.ratio_high:.2f}), "
            f"before {then.ratio:.2f} ({then.ratio_low:.2f}–{then.ratio_high:.2f}) to {then.best_peer}"
        )


def check(now: dict[str, Any], baseline: dict[str, Any]) -> list[Change]:
    """Our rows that both results have, with the verdict on each.

    A ratio is worse if its whole 20-80 % range lies under the baseline's, and its median by more than 5 %: what two runs
    of the same code do not show. Rows of another best peer are compared all the same: the best peer is the yardstick.

    Raises:
        ValueError: the two have no row in common.
    """
    before = {row.key: row for row in schema.rows_of(baseline) if row.ours and row.ratio is not None}
    changes = []
    for row in schema.rows_of(now):
        then = before.get(row.key)
        if then is None or row.ratio is None:
            continue
        values = (row.ratio_high, then.ratio_low, then.ratio)
        high, low, median = (math.nan if v is None else v for v in values)
        changes.append(Change(row, then, worse=high < low and row.ratio < (1 - SMALLEST_LOSS) * median))
    if not changes:
        raise ValueError("the baseline and this run have no row with a ratio in common")
    return changes


def baseline(path: Path, name: str, device: str) -> tuple[dict[str, Any], str]:
    """The result to compare with, and where it is of another machine a line that says so.

    path: a result file, or a folder with one folder for each machine: then the file ``name`` of this machine's, else the
    newest of any. Raises FileNotFoundError where there is none.
    """
    if not path.is_dir():
        return schema.read(path), ""
    found = {file: schema.read(file) for file in sorted(path.glob(f"*/{name}"))}
    if not found:
        raise FileNotFoundError(f"--check {path}: no folder in it has a {name}")
    here = (device, name_of(device), torch.get_num_threads())
    ours = {file: content for file, content in found.items() if _place(content) == here}
    file, content = max((ours or found).items(), key=lambda pair: str(pair[1]["date"]))
    return content, "" if ours else f"no {name} of this machine in {path}; compared with {file}"


def _place(content: dict[str, Any]) -> tuple[str, str, int]:
    machine = content["machine"]
    return machine["kind"], machine["name"], machine["threads"]


@contextlib.contextmanager
def other_commit(revision: str) -> Iterator[Path]:
    """A built checkout of another commit with today's benchmarks in it, in a temporary git worktree.

    Raises:
        RuntimeError: this is no clone, there is no such revision, or it does not build; with the last lines said.
    """
    top = _run(["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--show-toplevel"], "find the clone")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        _run(["git", "-C", top, "worktree", "add", "--detach", str(tree), revision], f"check out {revision}")
        try:
            _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], f"build {revision}", tree)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(
                Path(__file__).resolve().parent, tree / "benchmarks", ignore=shutil.ignore_patterns("results")
            )
            if not (tree / "vitfast/benchmarks").exists():
                (tree / "vitfast/benchmarks").symlink_to("../benchmarks")
            yield tree
        finally:
            _run(["git", "-C", top, "worktree", "remove", "--force", str(tree)], "remove the worktree")


def _run(command: Sequence[str], what: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = " / ".join((done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-3:])
        raise RuntimeError(f"could not {what}: {said}")
    return done.stdout.strip()


def against(tree: Path, arguments: Sequence[str], passes: int = 2) -> tuple[dict[str, Any], dict[str, Any]]:
    """(now, then): our rows here and in the other checkout, in processes of their own, in turn; the quieter pass counts.

    Args:
        tree: of ``other_commit``.
        arguments: of ``python -m vitfast.benchmarks.rows``: what to run.
    """
    here = Path(__file__).resolve().parents[1]
    best: dict[Path, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(passes):
            for root in (here, tree) if i % 2 == 0 else (tree, here):
                out = Path(folder) / f"{i}-{root == here}.json"
                command = [sys.executable, "-m", "vitfast.benchmarks.rows", "--out", str(out), *arguments]
                _measure(command, root)
                best[root] = quieter(best[root], schema.read(out)) if root in best else schema.read(out)
    return best[here], best[tree]


def _measure(command: Sequence[str], root: Path) -> None:
    """Run with ``root`` first on the path; its own progress shows."""
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode:
        raise RuntimeError(f"the benchmark of {root} ended with code {done.returncode}")


def quieter(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """a's rows, each with b's times where b's median is lower: the pass that was disturbed less."""
    other = {row.key: i for i, row in enumerate(schema.rows_of(b))}
    rows = []
    for row, entry in zip(schema.rows_of(a), a["rows"], strict=True):
        twin = b["rows"][other[row.key]] if row.key in other else entry
        rows.append(min((entry, twin), key=lambda e: e["ms"] if e["ms"] is not None else math.inf))
    return a | {"rows": rows}


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[tuple[Row, Row, str]]:
    """(row now, row then, "faster" | "slower" | "same") for every timed row of ours that both have.

    "same" where the 20-80 % ranges touch.
    """
    before = {row.key: row for row in schema.rows_of(then)}
    found = []
    for row in schema.rows_of(now):
        old = before.get(row.key)
        if not row.ours or old is None or row.ms_low is None or old.ms_low is None:
            continue
        verdict = "same"
        if row.ms_high is not None and row.ms_high < old.ms_low:
            verdict = "faster"
        elif old.ms_high is not None and old.ms_high < row.ms_low:
            verdict = "slower"
        found.append((row, old, verdict))
    return found
