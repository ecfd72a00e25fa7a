"""Pictures of result rows: time against a size, share of the floor, the roofline, memory against the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from .harness import shape_of, shape_text
from .report import MIN_GROWTH, best_of, cases, ours_of
from .schema import Row

matplotlib.use("Agg")  # draws to files, needs no display
import matplotlib.pyplot as plt

_OURS = "#1b5fa6"
_PEERS = ("#d1495b", "#e08e2b", "#6a994e", "#8d6cab", "#8c6d46", "#5c7f8a", "#c06c9c")
_LINES = ("-", "--", "-.", ":")  # of our backends or policies, which share a colour
_MOST_PANELS = 6
_MOST_BARS = 28


def draw(rows: Sequence[Row], machine: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Every picture that the rows have the points for, as PNG files in ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, function in (("growth", growth), ("floor", floor), ("roofline", roofline), ("memory", memory)):
        figure = function(rows, machine)
        if figure is not None:
            path = folder / f"{prefix}{name}.png"
            figure.savefig(path, dpi=110)
            plt.close(figure)
            made.append(path)
    return made


def _color(provider: str, ours: bool, order: dict[str, int]) -> str:
    return _OURS if ours else _PEERS[order.setdefault(provider, len(order)) % len(_PEERS)]


def _series(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, list[tuple[int, Row]]]]:
    """(op, dtype, direction, axis, other axes) -> provider -> (size, row), where an axis has three sizes or more."""
    panels: dict[tuple[str, ...], dict[str, list[tuple[int, Row]]]] = {}
    for row in rows:
        shape = shape_of(row.shape)
        for axis, size in shape.items():
            if isinstance(size, int):
                rest = shape_text({a: s for a, s in shape.items() if a != axis})
                panel = panels.setdefault((row.op, row.dtype, row.direction, axis, rest), {})
                panel.setdefault(row.provider, []).append((size, row))
    return {
        key: {name: sorted(points, key=lambda point: point[0]) for name, points in panel.items()}
        for key, panel in panels.items()
        if len({size for points in panel.values() for size, _ in points}) >= MIN_GROWTH
    }


def _grid(count: int, width: float = 5.6, height: float = 4.2) -> tuple[Any, list[Any]]:
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, list(axes.flat[:count])


def growth(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """Milliseconds against the size of one axis, both logarithmic; bands are the 20-80 % quantiles, dashes the floor."""
    panels = _series([row for row in rows if row.ms is not None])
    wanted = [key for key in panels if key[2] in ("forward", "both")][:_MOST_PANELS]
    if not wanted:
        return None
    figure, axes = _grid(len(wanted))
    order: dict[str, int] = {}
    for axis, key in zip(axes, wanted, strict=True):
        mine = [provider for provider, points in panels[key].items() if points[0][1].ours]
        op, dtype, direction, name, rest = key
        floor_points: dict[int, float] = {}
        for provider, points in panels[key].items():
            sizes, ours = [size for size, _ in points], points[0][1].ours
            style: dict[str, Any] = {"color": _color(provider, ours, order), "label": provider}
            style["linestyle"] = _LINES[mine.index(provider) % len(_LINES)] if ours else "-"
            axis.plot(
                sizes, [row.ms for _, row in points], marker="o", markersize=4, linewidth=2 if ours else 1.3, **style
            )
            low, high = [row.ms_low or 0 for _, row in points], [row.ms_high or 0 for _, row in points]
            axis.fill_between(sizes, low, high, alpha=0.15, color=style["color"], linewidth=0)
            floor_points |= {size: row.floor_ms for size, row in points}
        sizes = sorted(floor_points)
        axis.plot(sizes, [floor_points[s] for s in sizes], "k--", linewidth=1, label="floor")
        axis.set(
            xscale="log", yscale="log", xlabel=name, ylabel="milliseconds", title=f"{op} {direction}, {dtype}\n{rest}"
        )
        axis.set_xticks(sizes, [str(s) for s in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def floor(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """Share of the floor's speed that ours and the fastest peer reach, a pair of bars for each case."""
    pairs = [(mine, best_of(case)) for case in cases(rows) if (mine := ours_of(case)) and mine.op != "overhead"]
    pairs = _spread(pairs, _MOST_BARS)
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
    axis.set_xlabel(f"share of the floor's speed on {machine['name']} (1: the machine's own copy or product rate)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="upper right", fontsize=8)
    return figure


def _spread(items: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


def roofline(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """Rate reached against flops per byte, ours and the fastest peer, under the machine's roofs."""
    shown = [row for case in cases(rows) for row in (ours_of(case), best_of(case)) if row is not None]
    shown = [
        row
        for row in shown
        if row.op not in ("overhead", "memory", "train", "model", "accelerate", "accelerate_train")
        and row.bytes
        and row.flops
    ]
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
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def memory(rows: Sequence[Row], machine: dict[str, Any]) -> Any:
    """MiB kept for backward against the batch, a line for each policy and peer."""
    panels = {key: panel for key, panel in _series([r for r in rows if r.op == "memory"]).items() if key[3] == "B"}
    if not panels:
        return None
    panels = dict(list(panels.items())[:_MOST_PANELS])
    figure, axes = _grid(len(panels))
    order: dict[str, int] = {}
    for axis, ((_, dtype, _, _, rest), panel) in zip(axes, panels.items(), strict=True):
        mine = [name for name, points in panel.items() if points[0][1].ours]
        for provider, points in panel.items():
            ours = points[0][1].ours
            style = _LINES[mine.index(provider) % len(_LINES)] if ours else "-"
            color = _color(provider, ours, order)
            sizes, kept = [size for size, _ in points], [row.kept_mib for _, row in points]
            axis.plot(sizes, kept, linestyle=style, marker="o", markersize=4, color=color, label=provider)
        axis.set_xticks(sorted({size for points in panel.values() for size, _ in points}))
        axis.set(xlabel="batch", ylabel="MiB kept for backward", title=f"{rest}\n{dtype}", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
