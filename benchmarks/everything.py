"""`vitfast bench all`: every suite and its sweeps into one folder, in about the time given; goes on where it stopped.

Nothing is cut: how long each case is timed follows from the time that is left, within limits, and the number of cases is fixed.
The machine is measured once, so that all floors are the same. A file is finished, and its cases are skipped next time, if the
same code on the same machine made it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import schema
from .harness import TORCH_DTYPE, Settings
from .machine import load, measure, name_of, origin, same_code
from .options import SUITES as NAMES
from .options import file_name
from .pace import Pace
from .presets import adjusted
from .suites import SWEEPS, Item, Session, plan

MINUTES = 55.0
_FEWEST, _MOST = {"standard": 0.5, "sweep": 0.15}, {"standard": 2.0, "sweep": 0.6}  # seconds for each case and pass


@dataclass(frozen=True)
class Step:
    """One result file. ``minutes``: its part of ``MINUTES``; None as suite: all of them."""

    suite: str | None
    preset: str
    minutes: float

    @property
    def file(self) -> str:
        return file_name(self.suite, self.preset)

    def items(self, device: str, dtypes: Sequence[str] = ()) -> list[Item]:
        return plan(NAMES if self.suite is None else (self.suite,), device, self.preset, (), dtypes)


# What people ask for first comes first. Minutes as two cores with AMX need them, most of it models compiled by peers.
STEPS = (
    Step("model", "standard", 9),
    Step("train", "standard", 4),
    Step("int8", "standard", 2),
    Step("model", "growth", 8),
    Step("accelerate", "standard", 9),
    Step("attention", "standard", 4),
    Step("mlp", "standard", 3),
    Step("memory", "standard", 2),
    Step("model", "threads", 2),
    Step("layer_norm", "standard", 2.5),
    Step("patch_embed", "standard", 2.5),
    Step("attention", "growth", 2),
    Step("train", "growth", 2),
    Step("mlp", "growth", 0.5),
    Step("layer_norm", "growth", 0.7),
    Step("patch_embed", "growth", 0.7),
    Step("attention", "threads", 0.3),
    Step("overhead", "standard", 0.3),
    Step(None, "smoke", 0.5),
)
DRY = tuple(Step(name, "dry", 1) for name in NAMES)  # tiny, only to see that everything runs


@dataclass
class Everything:
    """One run of all steps."""

    folder: Path
    device: str
    command: str
    minutes: float = MINUTES
    dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    steps: tuple[Step, ...] = STEPS

    def run(self) -> list[dict[str, Any]]:
        """The contents of all files, each written as it grows. Raises Stopped after Ctrl-C, with the step's content."""
        start = time.monotonic()
        steps = [step for step in self.steps if self.device == "cpu" or step.preset != "threads"]
        machine = None
        contents = []
        for i, step in enumerate(steps):
            session, items = self._session(step)
            contents.append(session.content)
            if not items:
                self._say(f"{step.file}: done before, kept")
                continue
            if machine is None:
                self._say("measuring the machine")
                kinds = (TORCH_DTYPE[item.dtype] for other in steps for item in other.items(self.device, self.dtypes))
                machine = measure(self.device, tuple(dict.fromkeys(kinds)))
            if not session.content:
                session.start(step.items(self.device, self.dtypes), machine | {"load": load(machine)})
            gone, whole = time.monotonic() - start, 60 * self.minutes
            open_steps = sum(other.minutes for other in steps[i:])
            share = max(whole - gone, 0.0) * step.minutes / open_steps
            self._say(
                f"{step.file}, {i + 1} of {len(steps)}: {len(items)} cases, about {share / 60:.1f} min; "
                f"{gone / 60:.1f} of {self.minutes:g} min gone"
            )
            kind = "sweep" if step.preset in SWEEPS or step.suite is None else "standard"
            pace = Pace(time.monotonic() + share, _FEWEST[kind], _MOST[kind])
            contents[-1] = session.go_on(items, pace=pace)
        return contents

    def _session(self, step: Step) -> tuple[Session, list[Item]]:
        """The step's session with what an earlier run left of it, and the cases that are missing."""
        path = self.folder / step.file
        settings = adjusted(Settings(providers=self.providers), step.preset)
        session = Session(self.device, self.command, settings, path, step.preset)
        items = step.items(self.device, self.dtypes)
        if not path.exists():
            return session, items
        content = schema.read(path)
        reason = _not_ours(content, self.device, origin(self.command), step.preset)
        if reason:
            self._say(f"{step.file} is replaced: {reason}")
            return session, items
        have = {(row.op, row.shape, row.dtype) for row in schema.rows_of(content)}
        lost = {entry["provider"] for entry in content["absent"] if entry["reason"].startswith("out of memory")}
        missing = [item for item in items if item.key not in have and item.title not in lost]
        titles = {item.title for item in missing}
        content["absent"] = [entry for entry in content["absent"] if entry["provider"] not in titles]
        session.content = content
        return session, missing

    def _say(self, text: str) -> None:
        print(f"vitfast bench all: {text}", file=sys.stderr, flush=True)


def _not_ours(content: dict[str, Any], device: str, now: dict[str, Any], preset: str) -> str:
    """Why an earlier result file cannot be continued; "" if it can."""
    machine = content["machine"]
    if (machine["kind"], machine["name"]) != (device, name_of(device)):
        return f"it comes from another machine ({machine['name']})"
    if machine["threads"] != torch.get_num_threads():
        return f"it was measured with {machine['threads']} threads"
    if content["preset"] != preset:
        return f"its preset is {content['preset']}"
    if content["versions"] != now["versions"]:
        return "its versions of Python or packages differ"
    if not same_code(content["commit"], content["dirty"]):
        return f"it was made by other code (commit {(content['commit'] or 'unknown')[:10]})"
    return ""
