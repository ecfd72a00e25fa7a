"""Pictures of result rows: time and memory against a size, threads, share of the floor, the roofline."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .harness import shape_of
from .scaling import (
    AXES,
    QUANTITIES,
    THREADS,
    Panel,
    Points,
    exponent,
    growth_panels,
    milliseconds,
    panels,
)
from .schema import Row
from .tables import Machine, best_of, cases, number, ours_of

matplotlib.use("Agg")  # draws to files, needs no display
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from PIL import Image  # comes with matplotlib

_OURS = "#1b5fa6"
_PEERS = ("#d1495b", "#e08e2b", "#6a994e", "#8d6cab", "#8c6d46", "#5c7f8a", "#c06c9c")
_LINES = ("-", "--", "-.", ":")  # of our backends or policies, which share a colour
_MOST_PANELS = 6
_MOST_BARS = 28


def draw(results: Machine, most: int | None = None) -> list[Path]:
    """Every picture that the results have the points for, as PNG files beside them; returns their paths, at most ``most``.

    Pictures of an earlier run of the same kinds are removed.
    """
    folder = results.folder
    for name in (*_KINDS, "growth", "growth-*"):
        for old in folder.glob(f"{name}.png"):
            old.unlink()
    made: list[Path] = []
    for name, figure in _figures(results):
        if most is None or len(made) < most:
            made.append(folder / f"{name}.png")
            _save(figure, made[-1])
        plt.close(figure)
    return made


def _save(figure: Any, path: Path) -> None:
    """With a palette, which makes the file a quarter as large; by the octree, as others merge the colours of few pixels."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    with Image.open(drawn) as image:
        indexed = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    indexed.save(path, optimize=True)


def _figures(results: Machine) -> Iterator[tuple[str, Any]]:
    """(file name, picture), in the order of what says most."""
    every, machine = results.every, results.contents[0]["machine"]
    for name, function in _KINDS.items():
        figure = function(every if name == "threads" else results.rows, machine)
        if figure is not None:
            yield name, figure
    still = [row for row in every if THREADS not in shape_of(row.shape)]
    for op, dtype in dict.fromkeys((row.op, row.dtype) for row in still):
        figure = growth([row for row in still if (row.op, row.dtype) == (op, dtype)])
        if figure is not None:
            yield f"growth-{op}-{dtype}", figure


def _color(provider: str, ours: bool, order: dict[str, int]) -> str:
    return _OURS if ours else _PEERS[order.setdefault(provider, len(order)) % len(_PEERS)]


def _grid(count: int, width: float = 5.6, height: float = 4.2) -> tuple[Any, list[Any]]:
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def _line(axis: Any, points: Points, values: Sequence[float | None], style: dict[str, Any], ours: bool) -> None:
    axis.plot([size for size, _ in points], values, marker="o", markersize=4, linewidth=2 if ours else 1.3, **style)


def _styles(lines: dict[str, Points], order: dict[str, int]) -> dict[str, dict[str, Any]]:
    """A colour for each peer, the same in every panel, and a line style for each of ours."""
    mine = [provider for provider, points in lines.items() if points[0][1].ours]
    styles = {}
    for provider, points in lines.items():
        ours = points[0][1].ours
        line = _LINES[mine.index(provider) % len(_LINES)] if ours else "-"
        styles[provider] = {"color": _color(provider, ours, order), "linestyle": line}
    return styles


def growth(rows: Sequence[Row]) -> Any:
    """Of one op and dtype: a row of panels for each axis; milliseconds of each pass, and the peak memory of models.

    Both scales are logarithmic; bands are the 20-80 % quantiles, black dashes the floor, the exponents are fitted.
    """
    columns: dict[tuple[str, str], dict[str, Panel]] = {}
    for quantity, value in QUANTITIES.items():
        for panel in growth_panels(rows, value):
            wanted = panel.direction in ("forward", "both") and panel.op != "memory"
            if wanted and (quantity == "ms" or panel.op in ("model", "train")):
                held = columns.setdefault((quantity, panel.direction), {})
                if panel.axis not in held or len(held[panel.axis].sizes) < len(panel.sizes):
                    held[panel.axis] = panel
    axes = list(dict.fromkeys(axis for held in columns.values() for axis in held))
    if not axes:
        return None
    figure, grid = plt.subplots(
        len(axes), len(columns), figsize=(5.6 * len(columns), 4 * len(axes)), squeeze=False, layout="constrained"
    )
    order: dict[str, int] = {}
    for line, name in zip(grid, axes, strict=True):
        for axis, ((quantity, _), held) in zip(line, columns.items(), strict=True):
            if name in held:
                _growth_panel(axis, held[name], quantity, order)
            else:
                axis.set_axis_off()
    return figure


def _growth_panel(axis: Any, panel: Panel, quantity: str, order: dict[str, int]) -> None:
    value = QUANTITIES[quantity]
    styles = _styles(panel.lines, order)
    for provider, points in panel.lines.items():
        slopes = exponent(points, value)
        label = provider if slopes is None else f"{provider}: {panel.axis}^{slopes[0]:.2f}"
        style = styles[provider] | {"label": label}
        _line(axis, points, [value(row) for _, row in points], style, points[0][1].ours)
        if quantity == "ms":
            low, high = [row.ms_low or 0 for _, row in points], [row.ms_high or 0 for _, row in points]
            sizes = [size for size, _ in points]
            axis.fill_between(sizes, low, high, alpha=0.15, color=style["color"], linewidth=0)
    if quantity == "ms":
        floors = {size: row.floor_ms for points in panel.lines.values() for size, row in points}
        axis.plot(panel.sizes, [floors[size] for size in panel.sizes], "k--", linewidth=1, label="floor")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=AXES.get(panel.axis, panel.axis),
        ylabel="milliseconds" if quantity == "ms" else "peak memory, MiB",
        title=f"{panel.op} {panel.direction}, {panel.dtype}\n{panel.rest}",
    )
    axis.set_xticks(panel.sizes, [str(size) for size in panel.sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    _plain_ticks(axis.yaxis)
    axis.title.set_fontsize(9.5)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _plain_ticks(axis: Any) -> None:
    """0.5, 2 and 100 instead of powers of ten, at 1, 2 and 5 of each decade where there are few decades."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def threads(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """How many times as fast as with one thread, against the number of threads; dashes are the ideal."""
    shown = [panel for panel in panels(rows, milliseconds, (THREADS,)) if panel.sizes[0] == 1]
    shown = [panel for panel in shown if panel.direction in ("forward", "both")]
    if not shown:
        return None
    figure, axes = _grid(len(shown), height=4.4)
    order: dict[str, int] = {}
    for axis, panel in zip(axes, shown, strict=True):
        styles = _styles(panel.lines, order)
        for provider, points in panel.lines.items():
            one = points[0][1].ms
            if points[0][0] != 1 or one is None:
                continue
            gain = [one / row.ms if row.ms else None for _, row in points]
            label = f"{provider}: {number(points[-1][1].ms)} ms"
            _line(axis, points, gain, styles[provider] | {"label": label}, points[0][1].ours)
        axis.plot(panel.sizes, panel.sizes, "k--", linewidth=1, label="ideal")
        axis.set(
            xlabel=AXES[THREADS],
            ylabel="times as fast as one thread",
            title=f"{panel.op} {panel.direction}, {panel.dtype}\n{panel.rest}",
            xticks=panel.sizes,
        )
        axis.title.set_fontsize(9.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", title=f"(ms with {panel.sizes[-1]} threads)", title_fontsize=8)
    return figure


def floor(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """Share of the floor's speed that ours and the fastest peer reach, a pair of bars for each case."""
    pairs = [(mine, best_of(case)) for case in cases(rows) if (mine := ours_of(case)) and mine.op != "overhead"]
    pairs = _telling(pairs)
    if not pairs:
        return None
    figure, axis = plt.subplots(figsize=(9.5, 1.4 + 0.42 * len(pairs)), layout="constrained")
    for i, (mine, best) in enumerate(pairs):
        y = len(pairs) - i
        axis.barh(y + 0.2, mine.floor_share or 0, height=0.38, color=_OURS, label="vitfast" if i == 0 else None)
        if best is not None:
            label = "fastest peer (named)" if i == 0 else None
            axis.barh(y - 0.2, best.floor_share or 0, height=0.38, color=_PEERS[1], label=label)
            axis.text(
                (best.floor_share or 0) + 0.008, y - 0.2, best.provider, va="center", fontsize=7.5, color="#555555"
            )
    labels = [f"{m.op} {m.direction}, {m.dtype}\n{m.shape}" for m, _ in pairs]
    axis.set_yticks(range(len(pairs), 0, -1), labels, fontsize=7.5)
    axis.set_ylim(0.3, len(pairs) + 0.7)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axis.set_xlim(
        0, max(1.05, *(share + 0.2 for m, b in pairs for share in (m.floor_share or 0, (b or m).floor_share or 0)))
    )
    axis.set_xlabel(f"share of the floor's speed on {machine['name']} (1: its copy or multiply-add rate)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)  # above the bars
    return figure


def _telling(pairs: list[tuple[Row, Row | None]]) -> list[tuple[Row, Row | None]]:
    """At most ``_MOST_BARS``: models and training, of each op and dtype the first shape, then accelerated models."""
    first: dict[tuple[str, ...], tuple[Row, Row | None]] = {}
    for mine, best in pairs:
        if mine.direction != "backward":
            first.setdefault((mine.op, mine.dtype, mine.direction), (mine, best))
    whole = [pair for pair in pairs if "model" in shape_of(pair[0].shape)]
    ours = [pair for pair in whole if pair[0].op in ("model", "train")]
    chosen = list({mine.key: (mine, best) for mine, best in [*ours, *first.values(), *whole]}.values())[:_MOST_BARS]
    return sorted(chosen, key=lambda pair: [row.op for row, _ in chosen].index(pair[0].op))


def roofline(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """Rate reached against flops per byte, ours and the fastest peer, under the machine's roofs."""
    shown = [row for case in cases(rows) for row in (ours_of(case), best_of(case)) if row is not None]
    shown = [row for row in shown if "model" not in shape_of(row.shape) and row.op != "overhead"]
    shown = [row for row in shown if row.bytes and row.flops]
    if not shown:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 5.6), layout="constrained")
    intensities = [row.flops / row.bytes for row in shown]
    left, right = min(intensities) / 2, max(intensities) * 2
    grid = [left * (right / left) ** (i / 200) for i in range(201)]
    bandwidth = machine["copy_gb_per_s"] / 1e3
    for line, (dtype, rate) in zip(("-", "--", ":", "-."), machine["matrix_tflops"].items(), strict=False):
        axis.plot(
            grid, [min(rate, bandwidth * x) for x in grid], "k", linestyle=line, linewidth=1.2, label=f"roof, {dtype}"
        )
    markers = dict(zip(dict.fromkeys(row.op for row in shown), "osD^vP*X", strict=False))
    for row, x in zip(shown, intensities, strict=True):
        assert row.ms is not None
        fill: dict[str, Any] = {"color": _OURS} if row.ours else {"facecolors": "none", "edgecolors": _PEERS[1]}
        axis.scatter(x, row.flops / row.ms / 1e9, marker=markers.get(row.op, "o"), s=38, **fill)
    for op, marker in markers.items():
        axis.scatter([], [], marker=marker, color="grey", s=38, label=op)
    axis.scatter([], [], color=_OURS, s=38, label="vitfast (filled)")
    axis.scatter([], [], facecolors="none", edgecolors=_PEERS[1], s=38, label="fastest peer (open)")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="flops per byte",
        ylabel="TFLOP/s reached",
        title=f"Roofline, {machine['name']}",
    )
    _plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def memory(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """MiB kept for backward against the batch, a line for each policy and peer."""
    found = growth_panels([row for row in rows if row.op == "memory"], lambda row: row.kept_mib)
    shown = [panel for panel in found if panel.axis == "B"][:_MOST_PANELS]
    if not shown:
        return None
    figure, axes = _grid(len(shown))
    order: dict[str, int] = {}
    for axis, panel in zip(axes, shown, strict=True):
        styles = _styles(panel.lines, order)
        for provider, points in panel.lines.items():
            kept = [row.kept_mib for _, row in points]
            _line(axis, points, kept, styles[provider] | {"label": provider}, points[0][1].ours)
        axis.set_xticks(panel.sizes)
        axis.set(xlabel=AXES["B"], ylabel="MiB kept for backward", title=f"{panel.rest}\n{panel.dtype}", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


_KINDS: dict[str, Callable[[Sequence[Row], dict[str, Any]], Any]] = {
    "floor": floor,
    "roofline": roofline,
    "memory": memory,
    "threads": threads,
}
