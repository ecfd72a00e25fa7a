"""What was replaced in a model and what was left, and why: as a table and as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

ACTIONS = ("replaced", "partly replaced", "left")


@dataclass(frozen=True)
class ReportRow:
    """One module of the model that was looked at.

    Attributes:
        path: its name in ``model.named_modules()``.
        module: library and class, as ``timm.Block``.
        action: "replaced", "partly replaced" or "left".
        fused: the parts that run our ops, as ``("attention", "mlp")``.
        reason: why the rest does not, or when it will not; empty if there is nothing to say.
    """

    path: str
    module: str
    action: str
    fused: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class AccelerateReport:
    """What ``vitfast.report`` found. Prints as a table, in which rows that differ only in the path's numbers share a line."""

    model: str
    rows: list[ReportRow] = field(default_factory=list)
    backend: str | None = None
    recompute: str | None = None
    precision: str | None = None

    @property
    def accelerated(self) -> bool:
        """Whether anything in the model runs our ops."""
        return any(row.action != "left" for row in self.rows)

    def count(self, action: str) -> int:
        """How many modules were "replaced", "partly replaced" or "left"."""
        return sum(row.action == action for row in self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        """One dictionary for each row, ready for JSON."""
        return [vars(row) | {"fused": list(row.fused)} for row in self.rows]

    def summary(self) -> str:
        """One line: how many of which class, and what was left."""
        if not self.accelerated:
            return f"{self.model}: not accelerated"
        parts = []
        for action in ACTIONS:
            counts = Counter(row.module for row in self.rows if row.action == action)
            if counts:
                parts.append(f"{action} " + ", ".join(f"{n} x {module}" for module, n in counts.items()))
        options = f"backend={self.backend}, recompute={self.recompute}"
        if self.precision != "float":
            options += f", precision={self.precision}"
        return f"{self.model}: {'; '.join(parts)} ({options})"

    def __str__(self) -> str:
        lines: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            numbered = "".join("*" if part.isdigit() else part for part in _split_numbers(row.path))
            lines.setdefault((numbered, row.module, row.action, ", ".join(row.fused), row.reason), []).append(row.path)
        head = ("module", "count", "class", "", "fused", "why not, or when not")
        cells = [
            (paths[0] if len(paths) == 1 else pattern, str(len(paths)), *rest)
            for (pattern, *rest), paths in lines.items()
        ]
        widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [head, *cells]]
        return "\n".join([self.summary(), *table])


def _split_numbers(path: str) -> list[str]:
    """``blocks.11.norm`` as ["blocks", ".", "11", ".", "norm"], also where a number ends a name (``layer_11``)."""
    parts: list[str] = []
    for char in path:
        if parts and parts[-1].isdigit() == char.isdigit() and char != ".":
            parts[-1] += char
        else:
            parts.append(char)
    return parts
