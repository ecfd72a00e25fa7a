"""What `vitfast bench NAME` runs: the list of cases, one after the other, with the results written as they come."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import (
    bench_accelerate,
    bench_attention,
    bench_layer_norm,
    bench_mlp,
    bench_model,
    bench_overhead,
    bench_patch_embed,
    bench_train,
    schema,
)
from .harness import Case, DeviceLost, Settings, run_case, shape_text
from .machine import measure, origin
from .peers import absent

_OP_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_TRAIN_DTYPES = {"cpu": ("float32", "autocast"), "cuda": ("autocast", "bfloat16")}


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks: its module, its ops, its shapes by preset, and the dtypes it runs in unless told."""

    module: ModuleType
    ops: tuple[str, ...]
    shapes: dict[str, list[dict[str, int | str]]]
    dtypes: Mapping[str, tuple[str, ...]]


def _suite(module: ModuleType, dtypes: Mapping[str, tuple[str, ...]] = _OP_DTYPES) -> Suite:
    return Suite(module, module.OPS, module.SHAPES, dtypes)


SUITES = {
    "attention": _suite(bench_attention),
    "patch_embed": _suite(bench_patch_embed),
    "layer_norm": _suite(bench_layer_norm),
    "mlp": _suite(bench_mlp),
    "model": _suite(bench_model),
    "train": _suite(bench_train, _TRAIN_DTYPES),
    "accelerate": _suite(bench_accelerate, _TRAIN_DTYPES),
    "overhead": _suite(bench_overhead, {"cpu": ("float32",), "cuda": ("bfloat16",)}),
    "memory": Suite(bench_train, bench_train.MEMORY_OPS, bench_train.MEMORY_SHAPES, _TRAIN_DTYPES),
}


@dataclass(frozen=True)
class Item:
    """One case that is still to be made."""

    suite: str
    op: str
    shape: dict[str, int | str]
    dtype: str

    @property
    def title(self) -> str:
        return f"{self.op} {shape_text(self.shape)} {self.dtype}"

    def case(self, device: str) -> Case:
        return SUITES[self.suite].module.case(self.op, self.shape, self.dtype, device)


def plan(
    names: Sequence[str],
    device: str,
    preset: str = "standard",
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
) -> list[Item]:
    """The cases of some suites.

    ``shapes``: "AXIS=1,2,3" entries; their product replaces the preset's shapes, other axes keep the suite's defaults.
    Raises ValueError for an axis that the suite does not have.
    """
    items = []
    for name in names:
        suite = SUITES[name]
        key = {"standard": device, "overview": f"overview {device}", "dry": "dry"}.get(preset, preset)
        if preset == "growth" and device == "cuda":
            key = "growth cuda"
        chosen = suite.shapes[key] if not shapes else product_of(shapes, name, suite)
        for op, shape in itertools.product(suite.ops, chosen):
            kinds = tuple(dtypes) or suite.dtypes[device]
            if preset == "overview" and not dtypes:
                kinds = kinds[:1]
            items += [Item(name, op, suite.module.DEFAULTS | shape, dtype) for dtype in kinds]
    return items


def product_of(entries: Sequence[str], name: str, suite: Suite) -> list[dict[str, int | str]]:
    """["B=1,2", "L=64"] -> [{"B": 1, "L": 64}, {"B": 2, "L": 64}]."""
    axes: dict[str, list[int | str]] = {}
    known = suite.module.DEFAULTS | suite.shapes["dry"][0]  # a model's depth is an axis too, without a default
    for entry in entries:
        axis, equals, sizes = entry.partition("=")
        if not equals or axis not in known:
            example = shape_text(suite.module.DEFAULTS)
            raise ValueError(f"--shapes {entry!r} does not fit {name}; its axes and defaults: {example}")
        values: list[int | str] = []
        for size in sizes.split(","):
            number = isinstance(known[axis], int)
            if number and not size.isdigit():
                raise ValueError(f"--shapes {entry!r}: {size!r} is no whole number")
            values.append(int(size) if number else size)
        axes[axis] = values
    return [dict(zip(axes, sizes, strict=True)) for sizes in itertools.product(*axes.values())]


@dataclass
class Session:
    """One run: the machine is measured once, rows are added case by case, the file is whole after each."""

    device: str
    command: str
    settings: Settings
    path: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)

    def start(self, items: Sequence[Item]) -> None:
        from .harness import TORCH_DTYPE

        dtypes = tuple(dict.fromkeys(TORCH_DTYPE[item.dtype] for item in items)) or (torch.float32,)
        modules = dict.fromkeys(m for item in items for m in SUITES[item.suite].module.PEERS)
        self.content = {
            "schema": schema.SCHEMA,
            "machine": measure(self.device, dtypes),
            **origin(self.command),
            "rows": [],
            "absent": absent(modules, self.device),
        }

    def run(self, items: Sequence[Item], deadline: float | None = None) -> dict[str, Any]:
        """Run the cases; ``deadline`` (time.monotonic) stops before the next one, and says so in ``absent``.

        Raises DeviceLost when a kernel broke the GPU; the rows so far are written.
        """
        from dataclasses import asdict

        self.start(items)
        with progress(len(items)) as (report, advance):
            self.settings.report = report
            for item in items:
                if deadline is not None and time.monotonic() > deadline:
                    self._leave_out(item.title, "no time left for it")
                    continue
                try:
                    rows = run_case(item.case(self.device), self.content["machine"], self.settings)
                    self.content["rows"] += [asdict(row) for row in rows]
                except torch.OutOfMemoryError as error:
                    self._leave_out(item.title, f"out of memory: {' '.join(str(error).split())[:120]}")
                except DeviceLost:
                    self.save()
                    raise
                self.save()
                advance()
        return self.content

    def _leave_out(self, title: str, reason: str) -> None:
        self.content["absent"].append({"provider": title, "reason": reason, "install": ""})
        self.save()

    def save(self) -> None:
        if self.path is not None:
            schema.write(self.path, self.content)


@contextlib.contextmanager
def progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(report a line of text, one case is done): a bar in a terminal, a line for each case elsewhere."""
    if not sys.stderr.isatty():
        done = itertools.count(1)
        start = time.monotonic()
        last = [""]

        def report(text: str) -> None:
            last[0] = text.split(": ")[0]

        def advance() -> None:
            print(f"[{next(done)}/{total}, {time.monotonic() - start:.0f} s] {last[0]}", file=sys.stderr, flush=True)

        yield report, advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring the machine", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def overview_settings(settings: Settings) -> Settings:
    """The two-minute run: nobody who takes half a minute to start."""
    settings.providers = settings.providers or ("!*torch.compile*",)
    settings.seconds = min(settings.seconds, 1.0)
    return settings
