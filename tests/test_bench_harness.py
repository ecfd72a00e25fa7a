"""The harness measures what it says: whose turn it is, time, memory, and the floor that a time is held to."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from bench_checks import MACHINE, doubling
from torch import Tensor

from vitfast.benchmarks import harness, stopwatch
from vitfast.benchmarks.harness import Provider, Settings, Work

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rounds_take_turns_and_leave_out_the_warm_up() -> None:
    calls: list[str] = []

    def provider(name: str) -> Provider:
        def run(x: Tensor) -> Tensor:
            calls.append(name)
            return 2 * x

        return Provider(name, run)

    copies = [{"x": torch.ones(2)}]
    contenders = {n: harness.Contender(provider(n), "forward", copies, ()) for n in "abc"}
    for contender in contenders.values():
        contender.warm_up("cpu")
        contender.ms = 1000.0  # one call is a sample
    calls.clear()
    samples = harness.rounds(contenders, "cpu", "device", 0.0)
    orders = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1  # nobody always follows the same one
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys("abc", harness.MIN_ROUNDS)


def test_copies_of_the_inputs_exceed_the_cache() -> None:
    case = doubling([])
    size = {"x": torch.zeros(2**16)}  # a quarter MiB
    assert len(harness._copies(size, case, MACHINE)) == 2 * 4 + 1
    assert len(harness._copies(size, dataclasses.replace(case, hot=True), MACHINE)) == 1
    assert len(harness._copies({"x": torch.zeros(2)}, case, MACHINE)) == harness.MAX_COPIES
    first, second = harness._copies({"x": torch.zeros(2**19)}, case, MACHINE)[:2]
    assert first["x"].data_ptr() != second["x"].data_ptr()
    assert first["x"].requires_grad


def test_backward_is_timed_without_its_forward() -> None:
    events: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("forward")
            return 2 * x

        @staticmethod
        def backward(ctx: Any, d_out: Tensor) -> Tensor:
            events.append("backward")
            return 2 * d_out

    contender = harness.Contender(
        Provider("p", Noted.apply), "backward", [{"x": torch.ones(2, requires_grad=True)}], ("x",)
    )
    made = contender.calls(2)
    assert events == ["forward", "forward"]
    stopwatch.Stopwatch("cpu").sample(made, 0.0)
    assert events == ["forward", "forward", "backward", "backward"]


def test_device_time_starts_behind_a_busy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is queued, on a pretended GPU: wait, begin, the calls, end."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def elapsed_time(self, end: object) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(f"sleep {cycles}"))
    calls = [lambda: queue.append("call")] * 3
    assert stopwatch.Stopwatch("cuda", "device").sample(calls, 10.0) == 2.0
    sleep = f"sleep {80 * stopwatch.SLEEP_CYCLES_PER_US}"
    assert queue == ["synchronize", sleep, "event", "call", "call", "call", "event", "synchronize"]
    queue.clear()
    assert stopwatch.Stopwatch("cuda", "host").sample(calls, 10.0) == 2.0
    assert queue == ["synchronize", "event", "call", "call", "call", "event", "synchronize"]
    queue.clear()
    assert stopwatch.Stopwatch("cuda", "queue").sample(calls, 10.0) > 0
    assert queue == ["call", "call", "call"]


def test_memory_of_a_call() -> None:
    held: list[Tensor] = []
    peak, reason = stopwatch.peak_mib(lambda: held.append(torch.ones(48, 2**18)), "cpu")  # 48 MiB
    assert reason == ""
    assert 47 < peak < 60
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB, an input
    assert stopwatch.kept_mib(lambda: (x.exp() * x).sum(), [x]) == pytest.approx(1.0)
    assert stopwatch.kept_mib(lambda: (x.exp() * x).sum(), []) == pytest.approx(2.0)


def test_memory_of_a_runtime_is_that_of_its_first_call() -> None:
    arena: list[Tensor] = []

    def run(x: Tensor, held: list[Tensor]) -> Tensor:
        if not held:
            held.append(torch.ones(32, 2**18))  # 32 MiB, kept from call to call
        return 2 * x

    keeps = Provider("keeps", lambda x: run(x, arena), fresh=lambda: functools.partial(run, held=[]))
    hides = Provider("hides", lambda x: run(x, arena))
    rows = harness.run_case(doubling([hides, keeps]), MACHINE, Settings(seconds=0.001, directions=("forward",)))
    assert rows[0].peak_mib < 8
    assert 31 < rows[1].peak_mib < 40


def test_floor_is_bytes_flops_or_a_launch() -> None:
    moves, computes, launches = Work(10**7, 1), Work(1, 10**9), Work(1, 1)
    assert harness.floor_ms([moves], "float32", MACHINE) == pytest.approx(1.0)  # 10 MB at 10 GB/s
    assert harness.floor_ms([computes], "float32", MACHINE) == pytest.approx(10.0)  # a GFLOP at 0.1 TFLOP/s
    assert harness.floor_ms([computes], "autocast", MACHINE) == pytest.approx(5.0)
    assert harness.floor_ms([moves, launches], "float32", MACHINE) == pytest.approx(1.001)


def test_quantiles() -> None:
    assert harness.quantile([4, 1, 3, 2, 5], 0.5) == 3
    assert harness.quantile([1, 2], 0.2) == pytest.approx(1.2)
    assert harness.quantile([7], 0.8) == 7
