"""How time and memory grow: rows sorted into series along one axis, the exponent of each, and the gain from threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .harness import shape_of, shape_text
from .schema import Row

MIN_GROWTH = 3  # sizes that make a series
THREADS = "T"
# An axis that a sweep moves along with another, at a fixed multiple of it.
TIED = {"F": "D"}
AXES = {
    "B": "images (B)",
    "L": "tokens (L)",
    "H": "heads (H)",
    "E": "head dim (E)",
    "D": "width (D)",
    "F": "hidden width (F)",
    "S": "image side, pixels (S)",
    "P": "patch side, pixels (P)",
    "depth": "blocks (depth)",
    THREADS: "threads (T)",
}
Points = list[tuple[int, Row]]


@dataclass(frozen=True)
class Panel:
    """One op, dtype and pass along one axis, everything else the same; ``lines`` are the providers' points by size."""

    op: str
    dtype: str
    direction: str
    axis: str
    rest: str
    lines: dict[str, Points]

    @property
    def sizes(self) -> list[int]:
        return sorted({size for points in self.lines.values() for size, _ in points})


@dataclass(frozen=True)
class Fit:
    """``quantity`` of a provider grows as size^exponent over all sizes, and as size^last over the two largest."""

    row: Row
    axis: str
    quantity: str
    low: int
    high: int
    exponent: float
    last: float


def milliseconds(row: Row) -> float | None:
    return row.ms


def peak(row: Row) -> float | None:
    return row.peak_mib or None  # zero: less than a page


QUANTITIES: dict[str, Callable[[Row], float | None]] = {"ms": milliseconds, "peak MiB": peak}


def panels(rows: Iterable[Row], value: Callable[[Row], float | None], axes: Sequence[str] | None = None) -> list[Panel]:
    """Rows with a value, by everything but one whole-number axis; panels of a single size are left out."""
    found: dict[tuple[str, str, str, str, str], dict[str, Points]] = {}
    for row in rows:
        if value(row) is None:
            continue
        shape = shape_of(row.shape)
        for axis, size in shape.items():
            if isinstance(size, int) and (axes is None or axis in axes):
                key = (row.op, row.dtype, row.direction, axis, _rest(shape, axis))
                found.setdefault(key, {}).setdefault(row.provider, []).append((size, row))
    made = [
        Panel(*key, {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()})
        for key, lines in found.items()
    ]
    return [panel for panel in made if len(panel.sizes) > 1]


def _rest(shape: dict[str, int | str], axis: str) -> str:
    """The other axes as text; what moves along with this one as a multiple of it."""
    size, others = shape[axis], {}
    for name, other in shape.items():
        multiple = TIED.get(name) == axis and isinstance(other, int) and isinstance(size, int) and other % size == 0
        if name != axis:
            others[name] = f"{int(other) // int(size)}{axis}" if multiple else other
    return shape_text(others)


def growth_panels(rows: Iterable[Row], value: Callable[[Row], float | None] = milliseconds) -> list[Panel]:
    """The panels of three sizes or more of any axis but the number of threads."""
    return [p for p in panels(rows, value) if p.axis != THREADS and len(p.sizes) >= MIN_GROWTH]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of log y over log x by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def exponent(points: Points, value: Callable[[Row], float | None]) -> tuple[float, float] | None:
    """(over all sizes, over the two largest); None for fewer than three sizes."""
    pairs = [(float(size), v) for size, row in points if (v := value(row)) is not None and size > 0]
    if len({size for size, _ in pairs}) < MIN_GROWTH:
        return None
    return slope(pairs), slope(pairs[-2:])


def fits(rows: Sequence[Row]) -> list[Fit]:
    """Of every provider along every axis with three sizes: of its time, and of its peak memory for models and training."""
    found = []
    for quantity, value in QUANTITIES.items():
        for panel in growth_panels(rows, value):
            if quantity != "ms" and panel.op not in ("model", "train"):
                continue
            for points in panel.lines.values():
                if (slopes := exponent(points, value)) is not None:
                    found.append(Fit(points[0][1], panel.axis, quantity, points[0][0], points[-1][0], *slopes))
    return found


@dataclass(frozen=True)
class Gain:
    """One provider with one thread and with the most threads."""

    one: Row
    most: Row
    threads: int

    @property
    def speed_up(self) -> float:
        return (self.one.ms or math.nan) / (self.most.ms or math.nan)


def gains(rows: Iterable[Row]) -> list[Gain]:
    """Every provider that has a time with one thread and with more."""
    found = []
    for panel in panels(rows, milliseconds, (THREADS,)):
        for points in panel.lines.values():
            (fewest, one), (most, last) = points[0], points[-1]
            if fewest == 1 and most > 1:
                found.append(Gain(one, last, most))
    return found
