"""Measures the search space of every tuned kernel (tune_attention.py, tune_patch_embed.py, tune_layer_norm.py) against the
rule of configs.py, for tile_table.py.

A place is what one row will stand for: a kernel and a class of shapes. A candidate takes it if it computes what the rule's
configuration computes, and is faster by the margin, at each of the place's shapes; and if it also fits, without a spill,
under the heaviest options that choose the same row, which are not timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from . import tile_rows
from .tune_trial import MARGIN, Run, Setting, microseconds, why_not


@dataclasses.dataclass(frozen=True)
class Place:
    """Inputs are made when they are needed: `timed` by shape, and `heavy`, which only have to fit and be right."""

    kernel: str
    where: dict[str, Any]
    timed: dict[str, Callable[[], Run]]
    heavy: tuple[Callable[[], Run], ...]
    candidates: tuple[Any, ...]
    compile_seconds: float  # of one candidate at one shape, on one core; for the estimate

    def row(self, config: Any, reason: str) -> dict:
        return {"kernel": self.kernel, "where": self.where, "config": dataclasses.asdict(config), "reason": reason}


def candidates(space: Iterable[Any], rule: Any, setting: Setting) -> tuple[Any, ...]:
    """The space without what the rule chooses already; in a dry run its first and its last."""
    found = [config for config in dict.fromkeys(space) if config != rule]
    return tuple(found[:1] + found[-1:] if setting.dry and len(found) > 2 else found)


def seconds(places: Iterable[Place]) -> float:
    """About how long measuring takes, at 0.1 s for the timing itself; heavy options are compiled for few candidates."""
    return sum(len(p.candidates) * len(p.timed) * (p.compile_seconds + 0.1) for p in places)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A run, what it gives by the rule, and how many microseconds that takes."""

    run: Run
    expected: list[Any]
    ruled: float


def by_rule(makers: Iterable[Callable[[], Run]], setting: Setting, timed: bool) -> list[Watched]:
    with tile_rows.trying():  # an empty table
        runs = [(run, run.results()) for run in (make() for make in makers)]
        return [Watched(run, right, microseconds(run.launch, setting.dry) if timed else 0.0) for run, right in runs]


def rejected(row: dict, runs: list[Watched]) -> str | None:
    """Why the row's configuration is left out, or None."""
    with tile_rows.trying(row):
        return next(filter(None, (why_not(w.run.results, w.expected) for w in runs)), None)


def measure(place: Place, setting: Setting) -> dict | None:
    """The row of the best candidate, or None where the rule's choice stands."""
    timed, heavy = by_rule(place.timed.values(), setting, True), None
    best, least = None, MARGIN
    left_out: dict[str, int] = {}
    for config in place.candidates:
        row = place.row(config, "a candidate")
        problem = rejected(row, timed)
        if problem is None:
            with tile_rows.trying(row):
                taken = [microseconds(w.run.launch, setting.dry) for w in timed]
            ratio = max(t / w.ruled for t, w in zip(taken, timed, strict=True))
            if ratio >= least and not setting.dry:  # a dry run's times mean nothing: there each goes all the way
                continue
            heavy = by_rule(place.heavy, setting, False) if heavy is None else heavy
            problem = rejected(row, heavy)
        if problem is not None:
            left_out[problem] = left_out.get(problem, 0) + 1
            continue
        shapes = zip(place.timed, taken, timed, strict=True)
        times = ", ".join(f"{t:.1f} us against the rule's {w.ruled:.1f} at {shape}" for shape, t, w in shapes)
        best, least = place.row(config, f"{setting.about}: {times}"), ratio
    for problem, count in left_out.items():
        print(f"  left out, {problem}: {count} of {len(place.candidates)}", flush=True)
    return best


def measured(place: Place, setting: Setting) -> tuple[dict, dict | None]:
    """What identifies the place's row, and the row, or None where the rule's choice stands."""
    row = measure(place, setting)
    where = " ".join(f"{name}={value}" for name, value in place.where.items())
    print(f"{place.kernel} {where}: {row['reason'] if row else 'the rule stands'}", flush=True)
    return {"kernel": place.kernel, "where": place.where}, row
