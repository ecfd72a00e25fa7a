"""What every table of results is made of: the rows of one machine, sorted into cases, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import schema
from .harness import shape_of
from .scaling import THREADS
from .schema import Row

_DEFAULTS_OF_OURS = ("vitfast", "vitfast fused")  # what a user gets without naming a backend or a policy
_ORDER = ("standard", "overview", "growth", "threads", "smoke", "dry")  # of trust, where two files measured the same


@dataclass(frozen=True)
class Machine:
    """The result files of one machine: their folder and their contents.

    A row that several files have counts once. ``rows`` are those of the tables: the standard cases, or where there are
    none what there is. ``every`` are the sweeps' too.
    """

    folder: Path
    contents: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        machine = self.contents[0]["machine"]
        threads = f", {counted(machine['threads'], 'thread')}" if machine["kind"] == "cpu" else ""
        return f"{machine['name']}{threads}"

    @property
    def date(self) -> str:
        """Of its newest file; later ones sort behind."""
        return max(str(content["date"]) for content in self.contents)

    @property
    def rows(self) -> tuple[Row, ...]:
        first = _distinct(self._of("standard")) or _distinct(self._of("overview"))
        return first or tuple(row for row in self.every if THREADS not in shape_of(row.shape))

    @property
    def every(self) -> tuple[Row, ...]:
        return _distinct(content for preset in _ORDER for content in self._of(preset))

    def _of(self, preset: str) -> list[dict[str, Any]]:
        return [content for content in self.contents if content["preset"] == preset]


def _distinct(contents: Iterable[dict[str, Any]]) -> tuple[Row, ...]:
    rows: dict[tuple[str, ...], Row] = {}
    for content in contents:
        for row in schema.rows_of(content):
            rows.setdefault(row.key, row)
    return tuple(rows.values())


def counted(number: int, word: str) -> str:
    return f"{number} {word}" + ("s" if number != 1 else "")


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one case and direction together, in the order of the file."""
    grouped: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return list(grouped.values())


def ours_of(case: Sequence[Row]) -> Row | None:
    """The row of what a user gets by default; None where vitfast has no number."""
    mine = [row for row in case if row.ours and row.ms is not None]
    named = [row for row in mine if row.provider in _DEFAULTS_OF_OURS]
    return next(iter(named or mine), None)


def best_of(case: Sequence[Row]) -> Row | None:
    peers = [row for row in case if not row.ours and row.ms is not None]
    return min(peers, key=lambda row: row.ms or math.inf) if peers else None


def number(x: float | None) -> str:
    """Three digits that count; a dash for none."""
    if x is None:
        return "–"
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = 2 - math.floor(math.log10(abs(x)))
    return f"{x:,.{max(0, min(digits, 5))}f}"


def times(row: Row | None) -> str:
    return "–" if row is None else f"{number(row.ms)} ({number(row.ms_low)}–{number(row.ms_high)})"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{x:.0%}"


def ratio(row: Row | None) -> str:
    if row is None or row.ratio is None:
        return "–"
    return f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)])
