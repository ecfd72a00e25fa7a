"""What `vitfast bench NAME` runs: the list of cases, one after the other, with the results written as they come."""

from __future__ import annotations

import contextlib
import dataclasses
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
    bench_int8,
    bench_layer_norm,
    bench_mlp,
    bench_model,
    bench_overhead,
    bench_patch_embed,
    bench_train,
    schema,
)
from .harness import Case, DeviceLost, Settings, first_line, run_case, shape_text
from .machine import measure, origin
from .pace import Pace
from .peers import absent
from .presets import thread_counts
from .schema import Row

_OP_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
_TRAIN_DTYPES = {"cpu": ("float32", "autocast"), "cuda": ("autocast", "bfloat16")}


@dataclass(frozen=True)
class Suite:
    """A set of benchmarks: its module, its ops, its shapes by preset, and the dtypes it runs in unless told.

    ``long`` are patterns of providers that a sweep leaves out unless they are named: they compile for every shape, or do
    what another one does.
    """

    module: ModuleType
    ops: tuple[str, ...]
    shapes: dict[str, list[dict[str, int | str]]]
    dtypes: Mapping[str, tuple[str, ...]]
    long: tuple[str, ...] = ("*torch.compile*", "vitfast torch")


def _suite(module: ModuleType, dtypes: Mapping[str, tuple[str, ...]] = _OP_DTYPES, long: tuple[str, ...] = ()) -> Suite:
    return Suite(module, module.OPS, module.SHAPES, dtypes, (*Suite.long, *long))


_LONG_TRAIN = (*Suite.long, "vitfast none", "vitfast mlp", "pytorch eager")


SUITES = {
    "attention": _suite(bench_attention, long=("sdpa math",)),
    "patch_embed": _suite(bench_patch_embed),
    "layer_norm": _suite(bench_layer_norm),
    "mlp": _suite(bench_mlp),
    "model": _suite(bench_model, long=("pytorch eager", "torchvision", "transformers")),
    "int8": _suite(bench_int8, {"cpu": ("bfloat16",), "cuda": ("bfloat16",)}),
    "train": _suite(bench_train, _TRAIN_DTYPES, _LONG_TRAIN),
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
    def key(self) -> tuple[str, str, str]:
        return self.op, shape_text(self.shape), self.dtype

    @property
    def title(self) -> str:
        return " ".join(self.key)

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
    The presets growth and threads take a suite's first op only, and threads adds the axis T, the number of threads.
    Raises ValueError for an axis that the suite does not have.
    """
    items = []
    for name in names:
        suite = SUITES[name]
        chosen = product_of(shapes, name, suite) if shapes else suite.shapes[_key(preset, device)]
        ops = suite.ops
        if preset in SWEEPS:
            ops = ops[:1]
        if preset == "threads":
            chosen = [shape | {"T": n} for shape in chosen[:1] for n in thread_counts(torch.get_num_threads())]
        for op, shape in itertools.product(ops, chosen):
            kinds = tuple(dtypes) or suite.dtypes[device]
            if preset == "overview" and not dtypes:
                kinds = kinds[:1]
            items += [Item(name, op, suite.module.DEFAULTS | shape, dtype) for dtype in kinds]
    return items


def check(items: Sequence[Item], device: str, settings: Settings) -> None:
    """Raise ValueError where a case cannot be, or where all that was named is nobody, before minutes of measuring."""
    for item in items:
        module = SUITES[item.suite].module
        if hasattr(module, "check"):  # making these cases makes models
            module.check(item.shape)
        else:
            item.case(device)
    if (settings.providers or settings.directions) and len({item.suite for item in items}) == 1:
        case = items[0].case(device)
        if settings.directions and not set(case.directions) & set(settings.directions):
            raise ValueError(f"--direction: {case.op} has {', '.join(case.directions)} only")
        found = case.providers() if settings.providers else []
        if found and not any(map(settings.wants, found)):
            names = ", ".join(provider.name for provider in found)
            raise ValueError(f"--providers {' '.join(settings.providers)}: nobody; there are {names}")


SWEEPS = ("growth", "threads")


def _key(preset: str, device: str) -> str:
    """The name of a preset's list of shapes."""
    if preset == "growth":
        return "growth cuda" if device == "cuda" else "growth"
    return {"standard": device, "threads": device, "dry": "dry"}.get(preset, f"overview {device}")


def product_of(entries: Sequence[str], name: str, suite: Suite) -> list[dict[str, int | str]]:
    """["B=1,2", "L=64"] -> [{"B": 1, "L": 64}, {"B": 2, "L": 64}]."""
    axes: dict[str, list[int | str]] = {}
    known = suite.module.DEFAULTS | suite.shapes["dry"][0] | getattr(suite.module, "OPTIONAL", {})
    known |= suite.module.DEFAULTS | {"T": 1}  # T: threads, of every suite
    for entry in entries:
        axis, equals, sizes = entry.partition("=")
        if not equals or axis not in known:
            defaults, more = (
                shape_text(suite.module.DEFAULTS),
                " ".join(a for a in known if a not in suite.module.DEFAULTS),
            )
            raise ValueError(f"--shapes {entry!r} does not fit {name}; its axes and defaults: {defaults}; also: {more}")
        values: list[int | str] = []
        for size in sizes.split(","):
            number = isinstance(known[axis], int)
            if number and not (size.isdigit() and int(size)):
                raise ValueError(f"--shapes {entry!r}: {size!r} is no whole number over zero")
            values.append(int(size) if number else size)
        axes[axis] = values
    return [dict(zip(axes, sizes, strict=True)) for sizes in itertools.product(*axes.values())]


class Stopped(KeyboardInterrupt):
    """Ctrl-C in the middle of a run; ``content`` is what was measured until then.

    ``done`` of ``total`` cases are in it.
    """

    def __init__(self, content: dict[str, Any], done: int, total: int) -> None:
        super().__init__()
        self.content, self.done, self.total = content, done, total


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of PyTorch's (and of runtimes made inside); 0 leaves them as they are."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Session:
    """One run: the machine is measured once, rows are added case by case, the file is whole after each."""

    device: str
    command: str
    settings: Settings
    path: Path | None = None
    preset: str = "standard"
    content: dict[str, Any] = field(default_factory=dict)

    def start(self, items: Sequence[Item], machine: dict[str, Any] | None = None) -> None:
        """An empty result for these cases, on ``machine`` if that was measured already."""
        from .harness import TORCH_DTYPE

        dtypes = tuple(dict.fromkeys(TORCH_DTYPE[item.dtype] for item in items)) or (torch.float32,)
        modules = dict.fromkeys(m for item in items for m in SUITES[item.suite].module.PEERS)
        self.content = {
            "schema": schema.SCHEMA,
            "machine": machine or measure(self.device, dtypes),
            **origin(self.command),
            "preset": self.preset,
            "rows": [],
            "absent": absent(modules, self.device),
        }
        if self.preset in SWEEPS and not self.settings.providers:
            for suite in dict.fromkeys(item.suite for item in items):
                names = ", ".join(SUITES[suite].long)
                self._leave_out(names, f"{suite}: not in the {self.preset} preset unless named with --providers")

    def run(self, items: Sequence[Item], deadline: float | None = None) -> dict[str, Any]:
        """Run the cases; ``deadline`` (time.monotonic) stops before the next one, and says so in ``absent``.

        Raises:
            DeviceLost: a kernel broke the GPU; the rows so far are written.
            Stopped: by Ctrl-C; likewise.
        """
        self.start(items)
        return self.go_on(items, deadline)

    def go_on(self, items: Sequence[Item], deadline: float | None = None, pace: Pace | None = None) -> dict[str, Any]:
        """As ``run``, adding to a result that was started or read from a file; ``pace`` says how long each case is timed."""
        with progress(len(items)) as (report, advance):
            for i, item in enumerate(items):
                if deadline is not None and time.monotonic() > deadline:
                    self._leave_out(item.title, "no time left for it")
                    continue
                settings = dataclasses.replace(self.settings, report=report)
                if pace is not None:
                    settings.seconds = pace.seconds(len(items) - i)
                started = time.monotonic()
                try:
                    rows = self._run_item(item, settings)
                except KeyboardInterrupt:
                    for left in items[i:]:
                        self._leave_out(left.title, "stopped before it was done")
                    raise Stopped(self.content, i, len(items)) from None
                except DeviceLost:
                    self.save()
                    raise
                if pace is not None:
                    pace.learn(time.monotonic() - started, settings.seconds, len({row.direction for row in rows}))
                self.save()
                advance()
        return self.content

    def _run_item(self, item: Item, settings: Settings) -> list[Row]:
        if self.preset in SWEEPS and not settings.providers:
            settings.providers = tuple(f"!{pattern}" for pattern in SUITES[item.suite].long)
        rows: list[Row] = []
        try:
            with threads(int(item.shape.get("T", 0))):
                rows = run_case(item.case(self.device), self.content["machine"], settings)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._leave_out(item.title, f"out of memory: {first_line(error)}")
        except RuntimeError as error:  # PyTorch's own on a CPU has no type
            if "can't allocate memory" not in str(error):
                raise
            self._leave_out(item.title, f"out of memory: {first_line(error)}")
        self.content["rows"] += [_six_digits(dataclasses.asdict(row)) for row in rows]
        return rows

    def _leave_out(self, title: str, reason: str) -> None:
        self.content["absent"].append({"provider": title, "reason": reason, "install": ""})
        self.save()

    def save(self) -> None:
        if self.path is not None:
            schema.write(self.path, self.content)


def _six_digits(entry: dict[str, Any]) -> dict[str, Any]:
    """More than any clock has, and half of the file's size."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in entry.items()}


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
    from rich.table import Column

    whole = Column(no_wrap=True, min_width=7)  # the text gives way, not the figures
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = (BarColumn(16), MofNCompleteColumn(table_column=whole), TimeElapsedColumn(table_column=whole), text)
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("measuring the machine", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)
