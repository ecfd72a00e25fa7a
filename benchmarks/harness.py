"""One case, all its providers: gate, warm-up, interleaved rounds, medians, floor, ratios."""

from __future__ import annotations

import fnmatch
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .gate import FLOOR, Gate, Inputs, Run, cotangent, tensors_of
from .schema import Row
from .stopwatch import Call, Stopwatch, clocked, kept_mib, peak_mib, synchronize

TORCH_DTYPE = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "autocast": torch.bfloat16,
}
MIN_ROUNDS, MAX_ROUNDS = 5, 50
SETTLE_SECONDS = 0.005
MAX_COPIES = 32
COPY_BYTES = {"cpu": 2**29, "cuda": 2**32}  # the most that all copies of the inputs may take


class DeviceLost(RuntimeError):
    """A provider left the GPU in a state in which nothing runs any more; the message names the provider."""


class TooLong(RuntimeError):
    """One call takes longer than the settings allow."""


@dataclass(frozen=True)
class Work:
    """The least that one part of a call must do: bytes moved and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: "vitfast", "vitfast cpu", "pytorch eager", "sdpa flash", ...
        run: called with the case's inputs by name; returns the result or a tuple of results.
        ours: whether it is vitfast.
        directions: what it can do.
        fresh: makes a ``run`` that was never called, whose first call shows the peak memory; for a runtime that keeps its
            memory from call to call, where ``run`` would show nothing.
        slow: not run unless named in ``--providers`` (takes minutes to start, or is no fair time).
        note: goes to every row.
        step: what is timed as "both" where that is more than a forward and a backward pass (an optimizer's step).
        forward: the forward pass whose kept memory counts; None: ``run``.
        parameters: tensors that are no inputs and that do not count as kept memory (a model's).
    """

    name: str
    run: Run
    ours: bool = False
    directions: tuple[str, ...] = ("forward", "backward", "both")
    slow: bool = False
    note: str = ""
    fresh: Callable[[], Run] | None = None
    step: Run | None = None
    forward: Run | None = None
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Case:
    """One op at one shape and dtype.

    Attributes:
        inputs: makes the tensors by name, the same values each time.
        grads: names of those that get gradients; () for inference only.
        reference: plain PyTorch of the inputs in any dtype; the truth in fp64.
        work: for each direction the parts of the least work.
        batched: names of inputs whose first dimension is the batch.
        gate_samples: hold only the first samples of the batch against fp64; None for all.
        gate_floor: the error allowed where plain PyTorch is exact; None for the dtype's.
        truth_of: what gives the truth where it is not ``reference`` on fp64 inputs.
        timed: false where only memory is measured.
        hot: leave the inputs in the cache (for the cost of dispatch).
        timing: of the stopwatch.
    """

    op: str
    shape: Mapping[str, int | str]
    dtype: str
    device: str
    inputs: Callable[[], Inputs]
    grads: tuple[str, ...]
    reference: Run
    providers: Callable[[], list[Provider]]
    work: dict[str, list[Work]]
    batched: tuple[str, ...] = ()
    gate_samples: int | None = None
    gate_floor: float | None = None
    truth_of: Run | None = None
    timed: bool = True
    hot: bool = False
    timing: str = "device"

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(self.work)

    @property
    def title(self) -> str:
        return f"{self.op} {shape_text(self.shape)} {self.dtype}"


def shape_text(shape: Mapping[str, int | str]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in shape.items())


def shape_of(text: str) -> dict[str, int | str]:
    """The axes of a row's shape again."""
    pairs = (entry.split("=", 1) for entry in text.split())
    return {axis: int(size) if size.isdigit() else size for axis, size in pairs}


@dataclass
class Settings:
    """How a run measures.

    Attributes:
        seconds: time for the rounds of one case and direction.
        directions: of ("forward", "backward", "both"); None for all the case has.
        providers: shell patterns of provider names; "!pattern" leaves out. Empty: all but the slow ones.
        timing: the stopwatch's on a GPU; None for the case's own.
        longest: seconds; who takes longer for one call gets no time, only a note. None: no limit.
        report: called with one line of text as work goes on.
    """

    seconds: float = 2.0
    directions: tuple[str, ...] | None = None
    providers: tuple[str, ...] = ()
    timing: str | None = None
    longest: float | None = None
    report: Callable[[str], None] = field(default=lambda text: None)

    def wants(self, provider: Provider) -> bool:
        left_out = [p[1:] for p in self.providers if p.startswith("!")]
        named = [p for p in self.providers if not p.startswith("!")]
        if any(fnmatch.fnmatchcase(provider.name, p) for p in left_out):
            return False
        return any(fnmatch.fnmatchcase(provider.name, p) for p in named) if named else not provider.slow


def floor_ms(parts: Sequence[Work], dtype: str, machine: Mapping[str, Any]) -> float:
    """Milliseconds that the machine's own rates allow: each part takes its bytes, its flops or a launch, whichever is more."""
    rate = machine["matrix_tflops"][str(TORCH_DTYPE[dtype]).removeprefix("torch.")] * 1e9  # flops per ms
    bandwidth = machine["copy_gb_per_s"] * 1e6  # bytes per ms
    return sum(max(p.bytes / bandwidth, p.flops / rate, machine["launch_us"] * 1e-3) for p in parts)


def run_case(case: Case, machine: Mapping[str, Any], settings: Settings) -> list[Row]:
    """Every wanted provider in every wanted direction: gate, then rounds. Wrong or failing ones get the reason."""
    torch.compiler.reset()  # otherwise the cases share one recompile limit
    directions = [d for d in case.directions if settings.directions is None or d in settings.directions]
    providers = [p for p in case.providers() if settings.wants(p)]
    if not directions or not providers:
        return []
    inputs = case.inputs()
    grads = case.grads if any(d != "forward" for d in directions) else ()
    settings.report(f"{case.title}: the truth in fp64")
    gate = Gate.of(
        case.reference,
        inputs,
        grads,
        case.batched,
        case.gate_samples,
        FLOOR[TORCH_DTYPE[case.dtype]] if case.gate_floor is None else case.gate_floor,
        case.truth_of,
    )
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    for provider in providers:
        settings.report(f"{case.title}: {provider.name} against fp64")
        can = grads if set(provider.directions) & {"backward", "both"} else ()
        subset = gate if can else _results_only(gate)
        try:
            errors[provider.name], reason = subset.check(provider.run, inputs, can, case.batched)
            if reason:
                refused[provider.name] = f"wrong: {reason}"
        except Exception as error:  # any library's: the others go on, the row says why this one did not
            raise_if_lost(case.device, provider.name, error)
            refused[provider.name] = f"failed: {first_line(error)}"
    del gate
    rows = []
    for direction in directions:
        rows += _direction_rows(case, direction, providers, inputs, errors, refused, machine, settings)
    return rows


def _results_only(gate: Gate) -> Gate:
    truth = {name: t for name, t in gate.truth.items() if not name.startswith("gradient")}
    return Gate(truth, gate.plain, gate.samples, gate.floor)


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}"


def raise_if_lost(device: str, provider: str, error: BaseException) -> None:
    """Raise DeviceLost, starting with the provider's name, if the GPU no longer answers after its error."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            raise DeviceLost(f"{provider}: {first_line(error)}") from error


def _direction_rows(
    case: Case,
    direction: str,
    providers: Sequence[Provider],
    inputs: Inputs,
    errors: Mapping[str, float],
    refused: Mapping[str, str],
    machine: Mapping[str, Any],
    settings: Settings,
) -> list[Row]:
    parts = case.work[direction]
    rows, running = [], []
    for provider in providers:
        if direction not in provider.directions:
            continue
        row = Row(case.op, shape_text(case.shape), case.dtype, direction, provider.name, provider.ours)
        row.bytes, row.flops = sum(p.bytes for p in parts), sum(p.flops for p in parts)
        row.floor_ms = floor_ms(parts, case.dtype, machine)
        row.note, row.error = refused.get(provider.name, provider.note), _finite(errors.get(provider.name))
        rows.append(row)
        if provider.name not in refused:
            running.append(row)
    contenders = {}
    gc.collect()  # so that garbage of earlier cases is not freed inside a measurement
    copies = _copies(inputs, case, machine)
    for row in running:
        provider = next(p for p in providers if p.name == row.provider)
        contender = Contender(provider, direction, copies, case.grads)
        settings.report(f"{case.title}: {direction}, {provider.name}")
        try:
            contender.warm_up(case.device, settings.longest)
            call = functools.partial(provider.fresh(), **copies[0]) if provider.fresh else contender.one()
            row.peak_mib, reason = peak_mib(call, case.device)
            del call
            row.note = "; ".join(n for n in (row.note, reason) if n)
            if direction != "forward":
                own = [t for copy in copies for t in copy.values() if t is not None] + list(provider.parameters)
                row.kept_mib = kept_mib(contender.forward_only, own)
            contenders[row.provider] = contender
        except TooLong as error:
            row.note = f"left out: {error}"
        except Exception as error:  # as in the gate
            raise_if_lost(case.device, provider.name, error)
            row.note = f"failed: {first_line(error)}"
    if case.timed:
        settings.report(f"{case.title}: {direction}, {len(contenders)} providers in turn")
        timing = case.timing if case.timing == "queue" else settings.timing or case.timing
        add_times(rows, rounds(contenders, case.device, timing, settings.seconds))
    return rows


def _finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else x


def _copies(inputs: Inputs, case: Case, machine: Mapping[str, Any]) -> list[Inputs]:
    """Copies of the inputs, together ``cold_mib`` of the machine; tensors with gradients are leaves."""
    size = sum(t.numel() * t.element_size() for t in inputs.values() if t is not None)
    wanted = 1 if case.hot else math.ceil(machine["cold_mib"] * 2**20 / max(size, 1)) + 1
    count = max(1, min(wanted, MAX_COPIES, COPY_BYTES[case.device] // max(size, 1)))
    return [
        {n: None if t is None else t.detach().clone().requires_grad_(n in case.grads) for n, t in inputs.items()}
        for _ in range(count)
    ]


class Contender:
    """One provider in one direction: makes calls that are ready to be timed."""

    def __init__(self, provider: Provider, direction: str, copies: Sequence[Inputs], grads: Sequence[str]) -> None:
        self.provider, self.run, self.direction, self.copies, self.grads = (
            provider,
            provider.run,
            direction,
            copies,
            grads,
        )
        self.ms = self.host_us = 0.0
        self._next = 0
        self._cotangents: list[Tensor] = []

    def _copy(self) -> Inputs:
        self._next += 1
        return self.copies[self._next % len(self.copies)]

    def forward_only(self) -> Any:
        return (self.provider.forward or self.run)(**self._copy())

    def _forward(self, inputs: Inputs) -> Any:
        with torch.no_grad():
            return self.run(**inputs)

    def _both(self, inputs: Inputs) -> Any:
        results = tensors_of(self.run(**inputs))
        return torch.autograd.grad(results, self._leaves(inputs), self._cotangents_of(results))

    def _leaves(self, inputs: Inputs) -> list[Tensor]:
        return [leaf for n in self.grads if (leaf := inputs[n]) is not None]

    def _cotangents_of(self, results: Sequence[Tensor]) -> list[Tensor]:
        if not self._cotangents:
            self._cotangents = [cotangent(r.shape, r.device).to(r.dtype) for r in results]
        return self._cotangents

    def calls(self, count: int, keep_graph: bool = False) -> list[Call]:
        """``count`` calls, each on the next copy; for "backward" their forward passes run here, outside the time."""
        if self.direction == "forward":
            return [functools.partial(self._forward, self._copy()) for _ in range(count)]
        if self.direction == "both":
            if self.provider.step is not None:
                return [functools.partial(self.provider.step, **self._copy()) for _ in range(count)]
            return [functools.partial(self._both, self._copy()) for _ in range(count)]
        made: list[Call] = []
        for _ in range(count):
            inputs = self._copy()
            results = tensors_of(self.run(**inputs))
            arguments = (results, self._leaves(inputs), self._cotangents_of(results))
            made.append(functools.partial(torch.autograd.grad, *arguments, retain_graph=keep_graph))
        return made

    def one(self) -> Call:
        return self.calls(1)[0]

    def warm_up(self, device: str, longest: float | None = None) -> None:
        """Two calls, the first pays for caches, the second says how long one takes.

        Raises TooLong where the first takes more than ``longest`` seconds; what compiles did so in the gate.
        """
        first, _ = clocked(self.one(), device)
        if longest is not None and first > 1e3 * longest:
            raise TooLong(f"one call takes {first / 1e3:.1f} s, the limit is {longest:g}")
        self.ms, self.host_us = clocked(self.one(), device)


def rounds(contenders: Mapping[str, Contender], device: str, timing: str, seconds: float) -> dict[str, list[float]]:
    """Samples of every contender in milliseconds a call, one of each in every round, in another order each time.

    On a CPU each sample waits a little: threads of some libraries spin for milliseconds after a call, on the next one's time.
    """
    watches = {name: Stopwatch(device, timing) for name in contenders}
    counts, fixed = {}, {}
    for name, contender in contenders.items():
        prepared = contender.direction == "backward"
        counts[name] = watches[name].calls_per_sample(contender.ms, len(contender.copies), prepared)
        if timing == "graph" and device == "cuda":
            fixed[name] = contender.calls(counts[name], keep_graph=True)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, start, shuffled = list(contenders), time.perf_counter(), random.Random(0)
    for i in range(MAX_ROUNDS if names else 0):
        if i >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        shuffled.shuffle(names)
        for name in names:
            contender = contenders[name]
            calls = fixed.get(name) or contender.calls(counts[name])
            synchronize(device)
            if device == "cpu":
                time.sleep(SETTLE_SECONDS)
            samples[name].append(watches[name].sample(calls, contender.host_us))
            del calls
    return samples


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def add_times(rows: Sequence[Row], samples: Mapping[str, Sequence[float]]) -> None:
    """Medians, quantiles, share of the floor, and the ratio to the fastest peer, into the rows of one case."""
    for row in rows:
        times = samples.get(row.provider)
        if times:
            row.ms, row.samples = statistics.median(times), len(times)
            row.ms_low, row.ms_high = min(quantile(times, 0.2), row.ms), max(quantile(times, 0.8), row.ms)
            row.floor_share = row.floor_ms / row.ms
    peers = [row for row in rows if not row.ours and row.ms is not None]
    if not peers:
        return
    best = min(peers, key=lambda row: row.ms or math.inf)
    for row in _timed(rows):
        assert row.ms is not None
        assert best.ms is not None
        paired = [p / o for p, o in zip(samples[best.provider], samples[row.provider], strict=True)]
        row.best_peer, row.ratio = best.provider, best.ms / row.ms
        row.ratio_low = min(quantile(paired, 0.2), row.ratio)
        row.ratio_high = max(quantile(paired, 0.8), row.ratio)


def _timed(rows: Sequence[Row]) -> Iterator[Row]:
    return (row for row in rows if row.ms is not None)
