"""Where vitfast stands: the README's short table, and of all cases how many it wins, and which it loses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .harness import shape_of
from .schema import Row
from .tables import Machine, best_of, cases, counted, markdown_table, number, ours_of, percent, ratio

_HEADLINES = {
    "model": "inference",
    "int8": "int8 inference",
    "accelerate": "after `accelerate`",
    "train": "training step",
    "accelerate_train": "training step after `accelerate`",
}
_OF_MANY_MODELS = ("accelerate", "accelerate_train")  # one line for all of them
_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "autocast": "bf16 autocast"}
_NO_CONTEST = ("overhead", "memory")  # of another kind than the rest: not counted as won or lost
_POLICIES = ("vitfast fused", "vitfast mlp", "vitfast block")


def summaries(machines: Sequence[Machine]) -> str:
    """For the README: the newest machine's table, and a line for each of the others."""
    return "\n\n".join([summary(machines[0]), *map(brief, machines[1:])])


def summary(machine: Machine) -> str:
    """Whole models beside timm and the fastest peer, and the memory kept for the backward pass."""
    head = ("", "case", "vitfast, ms", "timm, ms", "fastest peer, ms", "peer / vitfast (20–80 %)")
    lines: list[Sequence[str]] = []
    for op, what in _HEADLINES.items():
        pairs = [(m, b) for case in _cases_of(machine, op) if (m := ours_of(case)) and (b := best_of(case))]
        if op in _OF_MANY_MODELS:
            lines += [(what, *cells) for cells in _of_many_models([mine for mine, _ in pairs])]
            continue
        for mine, best in pairs:
            timm = next((row for row in machine.rows if row.case == mine.case and row.provider == "timm"), None)
            peer = f"{best.provider} {number(best.ms)}"
            lines.append((what, case_text(mine), number(mine.ms), number(timm.ms if timm else None), peer, ratio(mine)))
    parts = [f"{machine.name}, {machine.date[:10]}:"]
    parts += [markdown_table(head, lines)] if lines else []
    parts += _kept(machine.rows)
    return "\n\n".join(parts) if len(parts) > 1 else f"{parts[0]} no whole model was measured."


def _cases_of(machine: Machine, op: str) -> list[list[Row]]:
    return cases([row for row in machine.rows if row.op == op])


def _of_many_models(mine: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each batch and dtype: the mean gain over the original models, and the least and the most."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in mine:
        groups.setdefault((str(shape_of(row.shape)["B"]), row.dtype), []).append(row)
    lines: list[tuple[str, ...]] = []
    for (batch, dtype), rows in groups.items():
        ratios = [row.ratio or 1.0 for row in rows]
        case = f"{counted(len(rows), 'model')}, {counted(int(batch), 'image')}, {_PRECISION[dtype]}"
        text = f"{geometric_mean(ratios):.2f} (models: {min(ratios):.2f}–{max(ratios):.2f})"
        lines.append((case, "–", "–", "the original", text))
    return lines


def brief(machine: Machine) -> str:
    """One paragraph: geometric means of the gain over the fastest peer."""
    words = []
    for op, what in _HEADLINES.items():
        mine = [row for case in _cases_of(machine, op) if (row := ours_of(case)) and row.ratio]
        by_dtype = {
            dtype: geometric_mean([row.ratio or 1.0 for row in mine if row.dtype == dtype])
            for dtype in dict.fromkeys(row.dtype for row in mine)
        }
        if by_dtype:
            words.append(f"{what} " + ", ".join(f"{_PRECISION[d]} {mean:.2f}" for d, mean in by_dtype.items()))
    means = "; ".join(words) or "no whole model was measured"
    return f"{machine.name}, {machine.date[:10]}, fastest peer / vitfast, geometric means: {means}."


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _kept(rows: Sequence[Row]) -> list[str]:
    """The memory table of the largest batch of each model and dtype; nothing without such rows."""
    largest: dict[tuple[str, ...], list[Row]] = {}
    for case in cases([row for row in rows if row.op == "memory" and row.kept_mib is not None]):
        shape = shape_of(case[0].shape)
        key = (*(f"{a}={s}" for a, s in shape.items() if a != "B"), case[0].dtype)
        held = largest.get(key)
        if held is None or int(shape_of(held[0].shape)["B"]) < int(shape["B"]):
            largest[key] = case
    head = ("kept for backward, MiB an image", "timm", *(p.replace("vitfast ", "vitfast, ") for p in _POLICIES))
    lines = []
    for case in largest.values():
        images = int(shape_of(case[0].shape)["B"])
        kept = {row.provider: (row.kept_mib or 0.0) / images for row in case}
        lines.append((case_text(case[0]), *(number(kept.get(name)) for name in ("timm", *_POLICIES))))
    return [markdown_table(head, lines)] if lines else []


def case_text(row: Row) -> str:
    """A model's case as people say it: "ViT-B/16, 8 images, fp32"; of an op its shape and dtype."""
    shape = shape_of(row.shape)
    if "model" not in shape:
        return f"{row.shape}, {_PRECISION[row.dtype]}"
    words = [model_text(str(shape.pop("model")))]
    if "B" in shape:
        words.append(counted(int(shape.pop("B")), "image"))
    return ", ".join([*words, *(f"{axis}={size}" for axis, size in shape.items()), _PRECISION[row.dtype]])


def model_text(name: str) -> str:
    """ "vit_base_patch16_224" -> "ViT-B/16"; other names as they are."""
    words = name.split("_")
    sizes = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}
    if len(words) == 4 and words[0] == "vit" and words[1] in sizes and words[2].startswith("patch"):
        side = "" if words[3] == "224" else f" at {words[3]} px"
        return f"ViT-{sizes[words[1]]}/{words[2].removeprefix('patch')}{side}"
    return name


def verdict(row: Row) -> str:
    """ "faster" or "slower" than the fastest peer where the whole 20-80 % range of the ratio says so, "equal" otherwise."""
    if row.ratio_low is not None and row.ratio_low > 1:
        return "faster"
    return "slower" if row.ratio_high is not None and row.ratio_high < 1 else "equal"


def standing(machine: Machine) -> str:
    """How often ours is faster than the fastest peer, by op, dtype and pass; then every case where it is slower."""
    mine = [row for case in cases(machine.rows) if (row := ours_of(case)) is not None and row.ratio is not None]
    mine = [row for row in mine if row.op not in _NO_CONTEST]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in mine:
        groups.setdefault((row.op, _PRECISION[row.dtype], row.direction), []).append(row)
    lines = []
    for key, rows in groups.items():
        counts = [str(sum(verdict(row) == word for row in rows)) for word in ("faster", "equal", "slower")]
        mean = geometric_mean([row.ratio or 1.0 for row in rows])
        floor = sum(row.floor_share or 0.0 for row in rows) / len(rows)
        lines.append((*key, *counts, f"{mean:.2f}", percent(floor)))
    head = ("op", "dtype", "pass", "faster", "equal", "slower", "peer / vitfast, geometric mean", "of the floor, mean")
    parts = [
        f"**{machine.name}**, ours as it comes against the fastest peer of each case:",
        markdown_table(head, lines),
    ]
    slower = sorted((row for row in mine if verdict(row) == "slower"), key=lambda row: row.ratio or 0.0)
    if slower:
        listed = ((r.op, r.shape, _PRECISION[r.dtype], r.direction, r.best_peer or "", ratio(r)) for r in slower)
        table = markdown_table(("slower in", "case", "dtype", "pass", "than", "peer / vitfast (20–80 %)"), listed)
        return "\n\n".join([*parts, table])
    return "\n\n".join([*parts, "In no case is the fastest peer faster beyond the spread."])
