"""From result files to what people read: the terminal's table, markdown, and the parts of documents that are measured.

A document has ``<!-- measured WHAT -->`` ... ``<!-- /measured -->``; what stands between is replaced, never typed.
WHAT is nothing (a summary), "all" (every table and plot), "fields" (the result file's layout).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import schema
from .harness import shape_of, shape_text
from .schema import FIELDS, Row

_DEFAULTS_OF_OURS = ("vitfast", "vitfast fused")  # what a user gets without naming a backend or a policy
_FULL_TABLES = (
    "model",
    "train",
    "memory",
    "accelerate",
    "accelerate_train",
)  # every provider has a line; of an op only ours and the best peer
_MARKER = re.compile(r"(<!-- measured ?(\w*) -->\n).*?(<!-- /measured -->)", re.DOTALL)
MIN_GROWTH = 3


@dataclass(frozen=True)
class Machine:
    """The result files of one machine: their folder, their contents, all their rows."""

    folder: Path
    contents: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]


def machines(folder: str | Path) -> list[Machine]:
    """One entry for each folder at or under ``folder`` that holds result files. Raises ValueError if there is none."""
    found = []
    for path in sorted({file.parent for file in Path(folder).rglob("*.json")}):
        contents = tuple(schema.read(file) for file in sorted(path.glob("*.json")))
        found.append(Machine(path, contents, tuple(row for c in contents for row in schema.rows_of(c))))
    if not found:
        raise ValueError(f"{folder} holds no result files (*.json)")
    return found


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


def headline(content: dict[str, Any]) -> str:
    """The machine, its rates, and what ran on it, as one paragraph."""
    machine = content["machine"]
    threads = f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in machine["matrix_tflops"].items())
    versions = " ".join(f"{name} {version}" for name, version in content["versions"].items())
    commit = (content["commit"] or "no clone")[:10] + (" with local changes" if content["dirty"] else "")
    load = "" if machine["load"] is None else f" Load before the run: {machine['load']:.2f}."
    driver = f" Driver {machine['driver']}." if machine["driver"] else ""
    return (
        f"{machine['name']}{threads}: copy {machine['copy_gb_per_s']:.0f} GB/s, {rates}, "
        f"launch {machine['launch_us']:.1f} us.{driver}{load} {content['date'][:10]}, commit {commit}. {versions}. "
        f"`{content['command']}`"
    )


def op_table(rows: Sequence[Row]) -> str:
    """Of one op: for every case and direction ours beside the fastest peer."""
    head = (
        "case",
        "dtype",
        "pass",
        "vitfast, ms (20–80 %)",
        "fastest peer",
        "its ms",
        "peer / vitfast",
        "of the floor",
    )
    lines = []
    for case in cases(rows):
        mine, best = ours_of(case), best_of(case)
        shown = mine or case[0]
        peer = "–" if best is None else best.provider
        cells = (times(mine), peer, number(best.ms) if best else "–", ratio(mine), percent(shown.floor_share))
        lines.append((shown.shape, shown.dtype, shown.direction, *cells))
    return markdown_table(head, lines)


def full_table(rows: Sequence[Row]) -> str:
    """Of models and training: one line for each provider."""
    timed = any(row.ms is not None for row in rows)
    head = ["case", "dtype", "provider"]
    head += ["ms (20–80 %)", "fastest peer / this", "of the floor"] if timed else []
    head += ["kept, MiB", "peak, MiB", "note"]
    lines = []
    for case in cases(rows):
        for row in sorted(case, key=lambda row: (row.ms or math.inf, not row.ours)):
            name = f"**{row.provider}**" if row.ours else row.provider
            cells = [times(row) if row.ms is not None else "–", ratio(row), percent(row.floor_share)] if timed else []
            lines.append(
                [
                    row.shape,
                    row.dtype,
                    name,
                    *cells,
                    number(row.kept_mib),
                    number(row.peak_mib),
                    row.note.replace("|", "/"),
                ]
            )
    return markdown_table(head, lines)


def growth(rows: Sequence[Row]) -> list[tuple[Row, str, int, int, float]]:
    """(a row, the axis, from, to, exponent) of every provider timed at three sizes or more of one axis.

    The exponent is the slope of log ms over log size by least squares: 1 where time grows in proportion.
    """
    series: dict[tuple[str, ...], list[tuple[int, Row]]] = {}
    for row in rows:
        if row.ms is None:
            continue
        shape = shape_of(row.shape)
        for axis, size in shape.items():
            if isinstance(size, int):
                rest = shape_text({a: s for a, s in shape.items() if a != axis})
                series.setdefault((row.op, axis, rest, row.dtype, row.direction, row.provider), []).append((size, row))
    found = []
    for (_, axis, *_), points in series.items():
        sizes = [math.log(size) for size, _ in points if size > 0]
        if len(set(sizes)) < MIN_GROWTH:
            continue
        logs = [math.log(row.ms or 1.0) for _, row in points]
        mean_x, mean_y = sum(sizes) / len(sizes), sum(logs) / len(logs)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, logs, strict=True))
        slope /= sum((x - mean_x) ** 2 for x in sizes)
        found.append((points[0][1], axis, min(s for s, _ in points), max(s for s, _ in points), slope))
    return found


def growth_table(rows: Sequence[Row]) -> str:
    head = ("op", "dtype", "pass", "provider", "axis", "from", "to", "ms grows as")
    lines = [
        (row.op, row.dtype, row.direction, row.provider, axis, str(low), str(high), f"{axis}^{slope:.2f}")
        for row, axis, low, high, slope in growth(rows)
    ]
    return markdown_table(head, lines) if lines else ""


def absent_lines(contents: Iterable[dict[str, Any]]) -> list[str]:
    entries = {(e["provider"], e["reason"], e["install"]): None for c in contents for e in c["absent"]}
    return [f"- {name}: {reason}" + (f"; `{install}`" if install else "") for name, reason, install in entries]


def everything(machine: Machine, plots: Sequence[str] = ()) -> str:
    """All tables of one machine; ``plots`` are links to pictures."""
    parts = [f"### {machine.contents[0]['machine']['name']}", *dict.fromkeys(map(headline, machine.contents))]
    for op in dict.fromkeys(row.op for row in machine.rows):
        rows = [row for row in machine.rows if row.op == op]
        parts += [f"#### {op}", full_table(rows) if op in _FULL_TABLES else op_table(rows)]
        failures = [r for r in rows if r.ms is None and r.note and r.op != "memory"]
        parts += [f"- no number: {r.provider}, {r.shape} {r.dtype} {r.direction}: {r.note}" for r in failures]
    if table := growth_table(machine.rows):
        parts += ["#### Growth", table]
    if lines := absent_lines(machine.contents):
        parts += ["#### Not in these tables", "\n".join(lines)]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    return "\n\n".join(parts)


def summary(machine: Machine) -> str:
    """Models, training steps and each op's first shape: ours beside the fastest peer."""
    head = ("what", "case", "dtype", "pass", "vitfast, ms", "fastest peer", "its ms", "peer / vitfast")
    lines, seen = [], set()
    for case in sorted(cases(machine.rows), key=lambda case: case[0].op not in ("model", "train")):
        mine, best = ours_of(case), best_of(case)
        row = case[0]
        once = (row.op, row.dtype, row.direction)
        if mine is None or best is None or row.op == "overhead" or (row.op not in _FULL_TABLES and once in seen):
            continue
        seen.add(once)
        cells = (number(mine.ms), best.provider, number(best.ms), ratio(mine))
        lines.append((row.op, row.shape, row.dtype, row.direction, *cells))
    first = machine.contents[0]
    threads = f", {first['machine']['threads']} threads" if first["machine"]["kind"] == "cpu" else ""
    return f"{first['machine']['name']}{threads}, {first['date'][:10]}:\n\n{markdown_table(head, lines)}"


def fields_table() -> str:
    lines = (
        (f"`{name}`", "/".join(t.__name__ for t in types) + (" or null" if nullable else ""), meaning)
        for name, (types, nullable, meaning) in FIELDS.items()
    )
    return markdown_table(("entry", "type", "meaning"), lines)


def fill(document: str, folder: str | Path, links_from: str | Path) -> str:
    """The document with every measured part made anew from the result files under ``folder``.

    Args:
        document: its text.
        folder: where the result files are.
        links_from: the document's folder; links to plots are relative to it.

    Raises:
        ValueError: the document has no marker, or a marker of an unknown kind.
    """
    found = machines(folder) if Path(folder).is_dir() and any(Path(folder).rglob("*.json")) else []

    def part(match: re.Match[str]) -> str:
        what = match[2]
        if what == "fields":
            text = fields_table()
        elif what not in ("", "all"):
            raise ValueError(f"<!-- measured {what} --> is not known; allowed: measured, measured all, measured fields")
        elif not found:
            text = "Not yet measured."
        elif what == "all":
            text = "\n\n".join(everything(m, _plot_links(m.folder, Path(links_from))) for m in found)
        else:
            text = "\n\n".join(summary(m) for m in found)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    filled, count = _MARKER.subn(part, document)
    if not count:
        raise ValueError("the document has no <!-- measured --> ... <!-- /measured -->")
    return filled


def _plot_links(folder: Path, start: Path) -> list[str]:
    import os

    return [Path(os.path.relpath(plot, start)).as_posix() for plot in sorted(folder.glob("*.png"))]


def print_table(content: dict[str, Any]) -> None:
    """Every row in the terminal: the case, then its providers from fastest to slowest, ours in bold."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    rows = schema.rows_of(content)
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        console.print(f"\n[bold underline]{op}[/]")
        for i, case in enumerate(cases(mine)):
            console.print(f"[cyan]{escape(case[0].shape)}  {case[0].dtype}  {case[0].direction}[/]")
            console.print(_case_table(case, header=i == 0))
    console.print()
    console.print(headline(content), markup=False)
    for line in absent_lines([content]):
        console.print(line, markup=False)


def _case_table(case: Sequence[Row], header: bool) -> Any:
    from rich.table import Table

    table = Table(box=None, show_header=header, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("  provider", width=28)
    for name, width in (("ms", 7), ("20–80 %", 13), ("floor", 5), ("ratio", 5), ("kept", 6), ("peak MiB", 8)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    for row in sorted(case, key=lambda row: (row.ms or math.inf, not row.ours)):
        spread = "–" if row.ms is None else f"{number(row.ms_low)}–{number(row.ms_high)}"
        faster = "–" if row.ratio is None else f"{row.ratio:.2f}"
        cells = (number(row.ms), spread, percent(row.floor_share), faster, number(row.kept_mib), number(row.peak_mib))
        style = "bold" if row.ours else ""
        table.add_row(f"  {row.provider}", *cells, style=style)
        if row.note:
            table.add_row(f"    [dim]{row.note[:200]}[/]" if "[" not in row.note else f"    {row.note[:200]}")
    return table
