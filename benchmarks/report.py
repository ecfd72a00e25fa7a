"""From result files to what people read: the terminal's table, markdown, and the parts of documents that are measured.

A document has ``<!-- measured WHAT -->`` ... ``<!-- /measured -->``; what stands between is replaced, never typed.
WHAT is nothing (a summary), "all" (every table and plot of the newest machine, links to those of the others), "standing" (won and
lost), "fields" (the result file's layout).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import schema
from .harness import shape_of, shape_text
from .scaling import AXES, THREADS, fits, gains
from .schema import FIELDS, Row
from .standing import standing, summaries
from .tables import (
    Machine,
    best_of,
    cases,
    counted,
    markdown_table,
    number,
    ours_of,
    percent,
    ratio,
    times,
)

# Every provider has a line; of other ops only ours and the best peer.
_FULL_TABLES = ("model", "train", "memory", "accelerate", "accelerate_train", "int8")
_MARKER = re.compile(r"(<!-- measured ?(\w*) -->\n).*?(<!-- /measured -->)", re.DOTALL)
GROWTH_LEGEND = (
    "The exponent of the size over the whole range (1: in proportion, 2: with the square), by least squares of the "
    "logarithms; in brackets that between the two largest sizes, where fixed costs count least."
)


def machines(folder: str | Path) -> list[Machine]:
    """One entry for each folder at or under ``folder`` that holds result files, the newest results first.

    Raises ValueError if there is none.
    """
    found = []
    for path in sorted({file.parent for file in Path(folder).rglob("*.json")}):
        contents = tuple(schema.read(file) for file in sorted(path.glob("*.json")))
        found.append(Machine(path, contents))
    if not found:
        raise ValueError(f"{folder} holds no result files (*.json)")
    return sorted(found, key=lambda machine: machine.date, reverse=True)


def headline(content: dict[str, Any]) -> str:
    """The machine and its rates, what ran on it and when, as one paragraph."""
    return f"{_machine_text(content)} {_versions(content)}. {_origin(content)}."


def provenance(contents: Sequence[dict[str, Any]]) -> str:
    """Of all files of one machine: its rates, as the newest found them, the versions, and every command."""
    newest = max(contents, key=lambda content: str(content["date"]))
    lines = [_machine_text(newest), *(f"{text}." for text in dict.fromkeys(map(_versions, contents)))]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for content in sorted(contents, key=lambda content: str(content["date"])):
        groups.setdefault((content["command"], _commit(content)), []).append(content)
    return "\n\n".join([*lines, "\n".join(f"- {_origin_of_all(group)}" for group in groups.values())])


def _machine_text(content: dict[str, Any]) -> str:
    machine = content["machine"]
    threads = f", {counted(machine['threads'], 'thread')}" if machine["kind"] == "cpu" else ""
    products = machine.get("product_tflops", {})
    rates = ", ".join(
        f"{dtype} {rate:.3g} TFLOP/s" + (f" (as products {products[dtype]:.3g})" if dtype in products else "")
        for dtype, rate in machine["matrix_tflops"].items()
    )
    cold, cache = machine.get("cold_mib"), machine["cache_mib"]
    source = f" in its {cache:.0f} MiB cache, as inputs are" if cold is not None and cold < 2 * cache else ""
    driver = f" Driver {machine['driver']}." if machine["driver"] else ""
    return (
        f"{machine['name']}{threads}: copy {machine['copy_gb_per_s']:.0f} GB/s{source}, {rates}, "
        f"launch {machine['launch_us']:.1f} us.{driver}"
    )


def _versions(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in content["versions"].items())


def _commit(content: dict[str, Any]) -> str:
    return (content["commit"] or "no clone")[:10] + (" with local changes" if content["dirty"] else "")


def _origin(content: dict[str, Any]) -> str:
    return _origin_of_all([content])


def _origin_of_all(contents: Sequence[dict[str, Any]]) -> str:
    """One command, when it ran (of several files: from the first to the last), the commit and the load before it."""
    dates = [content["date"][:16].replace("T", " ") for content in contents]
    loads = [load for content in contents if (load := content["machine"]["load"]) is not None]
    until = "" if dates[-1] == dates[0] else f" to {dates[-1] if dates[-1][:10] != dates[0][:10] else dates[-1][11:]}"
    text = f"`{contents[0]['command']}`: {dates[0]}{until} UTC, commit {_commit(contents[0])}"
    if not loads:
        return text
    range_of = f"{min(loads):.2f}" + (f" to {max(loads):.2f}" if max(loads) > min(loads) else "")
    return f"{text}, load before it {range_of}"


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


def growth_table(rows: Sequence[Row]) -> str:
    """Exponents: a line for each series, the providers side by side."""
    found = fits(rows)
    names = list(dict.fromkeys(fit.row.provider for fit in sorted(found, key=lambda fit: not fit.row.ours)))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for fit in found:
        what = (fit.quantity, fit.row.dtype, fit.row.direction, AXES.get(fit.axis, fit.axis), f"{fit.low}–{fit.high}")
        lines.setdefault(what, {})[fit.row.provider] = f"{fit.exponent:.2f} ({fit.last:.2f})"
    head = ("grows", "dtype", "pass", "with", "sizes", *names)
    return markdown_table(head, ((*what, *(cells.get(n, "–") for n in names)) for what, cells in lines.items()))


def threads_table(rows: Sequence[Row]) -> str:
    head = ("case", "dtype", "pass", "provider", "1 thread, ms", "all, ms", "threads", "speed-up", "of ideal")
    lines = []
    for gain in gains(rows):
        one = gain.one
        case = one.op + " " + shape_text({a: s for a, s in shape_of(one.shape).items() if a != THREADS})
        name = f"**{one.provider}**" if one.ours else one.provider
        cells = (number(one.ms), number(gain.most.ms), str(gain.threads), f"{gain.speed_up:.2f}")
        lines.append((case, one.dtype, one.direction, name, *cells, percent(gain.speed_up / gain.threads)))
    return markdown_table(head, lines)


def absent_lines(contents: Iterable[dict[str, Any]]) -> list[str]:
    entries = {(e["provider"], e["reason"], e["install"]): None for c in contents for e in c["absent"]}
    return [f"- {name}: {reason}" + (f"; `{install}`" if install else "") for name, reason, install in entries]


def everything(machine: Machine, plots: Sequence[str] = ()) -> str:
    """All tables of one machine; ``plots`` are links to pictures."""
    by_stem = {Path(plot).stem: plot for plot in plots}

    def pictures(*starts: str) -> list[str]:
        found = [stem for stem in by_stem if stem.startswith(starts)]
        return [f"![{stem.replace('-', ' ')}]({by_stem.pop(stem)})" for stem in found]

    parts = [f"### {machine.name}", provenance(machine.contents)]
    for op in dict.fromkeys(row.op for row in machine.rows):
        rows = [row for row in machine.rows if row.op == op]
        parts += [f"#### {op}", full_table(rows) if op in _FULL_TABLES else op_table(rows)]
        failures = [r for r in rows if r.ms is None and r.note and r.op != "memory"]
        if failures:
            listed = (f"- no number: {r.provider}, {r.shape} {r.dtype} {r.direction}: {r.note}" for r in failures)
            parts.append("\n".join(listed))
        parts += pictures(op) if op == "memory" else []
    parts += pictures("floor", "roofline")
    swept = [row for row in machine.every if row.ms is not None and THREADS not in shape_of(row.shape)]
    grown = [op for op in dict.fromkeys(row.op for row in swept) if fits([row for row in swept if row.op == op])]
    if grown:
        parts += ["#### Growth", GROWTH_LEGEND]
    for op in grown:
        parts += [f"**{op}**", growth_table([row for row in swept if row.op == op]), *pictures(f"growth-{op}-")]
    if gains(machine.every):
        parts += ["#### Threads", threads_table(machine.every), *pictures("threads")]
    if lines := absent_lines(machine.contents):
        parts += ["#### Not in these tables", "\n".join(lines)]
    parts += pictures("")
    return "\n\n".join(parts)


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

    kinds: dict[str, Callable[[list[Machine]], str]] = {
        "": summaries,
        "all": lambda machines: _newest_in_full(machines, Path(links_from)),
        "standing": lambda machines: "\n\n".join(map(standing, machines)),
    }

    def part(match: re.Match[str]) -> str:
        what = match[2]
        if what == "fields":
            text = fields_table()
        elif what not in kinds:
            allowed = ", ".join(f"measured {kind}".strip() for kind in (*kinds, "fields"))
            raise ValueError(f"<!-- measured {what} --> is not known; allowed: {allowed}")
        else:
            text = kinds[what](found) if found else "Not yet measured."
        return f"{match[1]}\n{text}\n\n{match[3]}"

    filled, count = _MARKER.subn(part, document)
    if not count:
        raise ValueError("the document has no <!-- measured --> ... <!-- /measured -->")
    return filled


def _newest_in_full(machines: list[Machine], start: Path) -> str:
    """Everything of the newest machine; of the others a link to the same in their folder."""
    first, *others = machines
    parts = [everything(first, _plot_links(first.folder, start))]
    for machine in others:
        link = _relative(machine.folder / "report.md", start)
        parts.append(f"### {machine.name}\n\nMeasured {machine.date[:10]}: [tables and plots]({link}).")
    return "\n\n".join(parts)


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


def _plot_links(folder: Path, start: Path) -> list[str]:
    return [_relative(plot, start) for plot in sorted(folder.glob("*.png"))]


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
    for name, width in (("ms", 7), ("20–80 %", 13), ("floor", 5), ("ratio", 5), ("kept", 7), ("peak MiB", 8)):
        table.add_column(name, justify="right", width=width, no_wrap=True)
    for row in sorted(case, key=lambda row: (row.ms or math.inf, not row.ours)):
        spread = "–" if row.ms is None else f"{number(row.ms_low)}–{number(row.ms_high)}"
        faster = "–" if row.ratio is None else f"{row.ratio:.2f}" if row.ratio < 10 else number(row.ratio)
        cells = (number(row.ms), spread, percent(row.floor_share), faster, number(row.kept_mib), number(row.peak_mib))
        style = "bold" if row.ours else ""
        table.add_row(f"  {row.provider}", *cells, style=style)
        if row.note:
            table.add_row(f"    [dim]{row.note[:200]}[/]" if "[" not in row.note else f"    {row.note[:200]}")
    return table
