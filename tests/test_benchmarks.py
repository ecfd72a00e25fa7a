"""The benchmarks measure what they say, refuse wrong results, and their documents are made from their files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from torch import Tensor

from vitfast.benchmarks import (
    bench_attention,
    bench_model,
    compare,
    gate,
    gpu,
    harness,
    options,
    parity,
    peers,
    plots,
    presets,
    report,
    scaling,
    schema,
    standing,
    stopwatch,
    suites,
)
from vitfast.benchmarks.harness import Case, Provider, Settings, Work
from vitfast.benchmarks.schema import Row
from vitfast.cli import bench
from vitfast.cli.main import main

ROOT = Path(__file__).parents[1]
MACHINE = {
    "kind": "cpu",
    "name": "Test CPU",
    "threads": 1,
    "cache_mib": 1.0,
    "cold_mib": 2.0,
    "copy_gb_per_s": 10.0,
    "matrix_tflops": {"float32": 0.1, "bfloat16": 0.2},
    "launch_us": 1.0,
    "dispatch_us": 1.0,
    "clocks": {},
    "driver": None,
    "load": 0.0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread would only wait for the machine's other users."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that measuring the machine takes."""
    monkeypatch.setattr(suites, "measure", lambda device, dtypes: MACHINE)


def content(*rows: Row) -> dict[str, Any]:
    return {
        "schema": schema.SCHEMA,
        "machine": MACHINE,
        "versions": {"torch": "2"},
        "commit": None,
        "dirty": None,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "vitfast bench",
        "preset": "standard",
        "rows": [dataclasses.asdict(row) for row in rows],
        "absent": [{"provider": "Other", "reason": "not installed", "install": "pip install other"}],
    }


def row(provider: str = "vitfast cpu", ms: float = 1.0, shape: str = "B=1 L=4", **values: Any) -> Row:
    made = Row(
        "attention", shape, "float32", "forward", provider, provider.startswith("vitfast"), ms, ms * 0.9, ms * 1.1
    )
    made = dataclasses.replace(made, samples=5, bytes=1000, flops=2000, floor_ms=0.5, floor_share=0.5 / ms)
    return dataclasses.replace(made, **values)


def ratio_row(ratio: float, low: float, high: float) -> Row:
    return row(best_peer="sdpa", ratio=ratio, ratio_low=low, ratio_high=high)


def doubling(providers: list[Provider], **changes: Any) -> Case:
    """x -> 2 x, with x's gradient."""
    case = Case(
        op="double",
        shape={"B": 3, "D": 4},
        dtype="float32",
        device="cpu",
        inputs=lambda: {"x": torch.arange(12.0).view(3, 4) + 1},
        grads=("x",),
        reference=lambda x: 2 * x,
        providers=lambda: providers,
        work={d: [Work(96, 12)] for d in ("forward", "backward", "both")},
        batched=("x",),
    )
    return dataclasses.replace(case, **changes)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return 2.01 * d_out


def test_the_gate_allows_what_the_tests_allow() -> None:
    assert gate.FACTOR == tolerances.FACTOR
    assert gate.FLOOR == tolerances.FLOOR


def test_a_wrong_result_gets_no_number_only_the_reason() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for\nthis shape")

    providers = [
        Provider("right", lambda x: x + x),
        Provider("ours", lambda x: x * 2, ours=True),
        Provider("wrong", lambda x: 2.001 * x),
        Provider("nan", lambda x: 2 * x + float("nan")),
        Provider("shape", lambda x: (2 * x).flatten()),
        Provider("gradient", WrongGradient.apply),
        Provider("fails", fails),
        Provider("slow", lambda x: 2 * x, slow=True),
    ]
    rows = harness.run_case(doubling(providers), MACHINE, Settings(seconds=0.001))
    schema.validate(content(*rows))
    by = {(r.provider, r.direction): r for r in rows}
    assert len(by) == 7 * 3
    for name in ("right", "ours"):
        timed = by[name, "both"]
        assert timed.ms
        assert timed.note == ""
        assert timed.samples >= harness.MIN_ROUNDS
        assert timed.best_peer == "right"
        assert timed.ratio == pytest.approx(by["right", "both"].ms / timed.ms)
        assert timed.floor_share == pytest.approx(timed.floor_ms / timed.ms)
        assert timed.error == 0
    reasons = {
        "wrong": "wrong: result is 0.0005 from fp64",
        "nan": "wrong: result is not finite",
        "shape": "wrong: result has shape (12,), expected (3, 4)",
        "gradient": "wrong: gradient of x is 0.005 from fp64",
        "fails": "failed: RuntimeError: no kernel for this shape",
    }
    for name, reason in reasons.items():
        for direction in ("forward", "backward", "both"):
            assert by[name, direction].ms is None
            assert by[name, direction].note.startswith(reason)


def test_the_gate_can_hold_the_first_samples_only() -> None:
    good = Provider("good", lambda x: 2 * x)
    late = Provider("late", lambda x: torch.cat([2 * x[:2], 3 * x[2:]]))
    early = Provider("early", lambda x: torch.cat([3 * x[:1], 2 * x[1:]]))
    case = doubling([good, late, early], gate_samples=2)
    notes = {r.provider: r.note for r in harness.run_case(case, MACHINE, Settings(seconds=0.001))}
    assert notes["good"] == notes["late"] == ""
    assert "result" in notes["early"]
    with pytest.raises(ValueError, match="need the whole batch"):
        gate.Gate.of(case.reference, case.inputs(), ("x",), (), 2, torch.float32)


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


def test_a_broken_gpu_ends_the_run_and_names_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harness.raise_if_lost("cpu", "p", ValueError("x"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    harness.raise_if_lost("cuda", "p", ValueError("x"))
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(harness.DeviceLost, match=r"^vitfast triton: ValueError: x"):
        harness.raise_if_lost("cuda", "vitfast triton", ValueError("x"))


def test_memory_of_a_call() -> None:
    held: list[Tensor] = []
    peak, reason = stopwatch.peak_mib(lambda: held.append(torch.ones(48, 2**18)), "cpu")  # 48 MiB
    assert reason == ""
    assert 47 < peak < 60
    x = torch.ones(2**18, requires_grad=True)  # 1 MiB, an input
    assert stopwatch.kept_mib(lambda: (x.exp() * x).sum(), [x]) == pytest.approx(1.0)
    assert stopwatch.kept_mib(lambda: (x.exp() * x).sum(), []) == pytest.approx(2.0)


def test_floor_is_bytes_flops_or_a_launch() -> None:
    moves, computes, launches = Work(10**7, 1), Work(1, 10**9), Work(1, 1)
    assert harness.floor_ms([moves], "float32", MACHINE) == pytest.approx(1.0)  # 10 MB at 10 GB/s
    assert harness.floor_ms([computes], "float32", MACHINE) == pytest.approx(10.0)  # a GFLOP at 0.1 TFLOP/s
    assert harness.floor_ms([computes], "autocast", MACHINE) == pytest.approx(5.0)
    assert harness.floor_ms([moves, launches], "float32", MACHINE) == pytest.approx(1.001)


def test_work_by_hand() -> None:
    case = bench_attention.case("attention", {"B": 2, "L": 3, "H": 5, "E": 8}, "bfloat16", "cpu")
    tensor = 2 * 3 * 5 * 8 * 2
    assert case.work["forward"] == [Work(4 * tensor, 2 * 2 * 5 * (2 * 3 * 3 * 8))]
    assert case.work["backward"] == [Work(8 * tensor, 5 * 2 * 5 * (2 * 3 * 3 * 8))]
    from vitfast.models.table import CONFIGS

    parts = bench_model.forward_work(CONFIGS["vit_base_patch16_224"], 1, 2)
    assert sum(part.flops for part in parts) == pytest.approx(2 * 17.58e9, rel=0.01)  # timm: 17.58 GMACs


def test_quantiles() -> None:
    assert harness.quantile([4, 1, 3, 2, 5], 0.5) == 3
    assert harness.quantile([1, 2], 0.2) == pytest.approx(1.2)
    assert harness.quantile([7], 0.8) == 7


def test_names_are_the_same_everywhere() -> None:
    assert tuple(suites.SUITES) == options.SUITES
    assert set(options.TIMINGS) < set(stopwatch.TIMINGS)
    for suite in suites.SUITES.values():
        assert {"overview cpu", "overview cuda", "cpu", "cuda", "growth", "growth cuda", "dry"} <= set(suite.shapes)
    for suite, _, _, _ in gpu.PARTS:
        assert suite in suites.SUITES


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize("name", options.SUITES)
def test_every_suite_runs(name: str, tmp_path: Path) -> None:
    few = ("vitfast", "vitfast cpu", "vitfast torch", "vitfast fused", "pytorch eager", "sdpa", "timm")
    path = tmp_path / "rows.json"
    session = suites.Session("cpu", "a test", Settings(seconds=0.001, providers=few), path)
    items = suites.plan([name], "cpu", "dry", dtypes=["float32"])
    rows = schema.rows_of(session.run(items))
    assert schema.read(path) == session.content
    assert {row.op for row in rows} == set(suites.SUITES[name].ops)
    for found in rows:
        assert found.error is not None
        assert found.error <= 1
        assert found.ms is not None or name == "memory"
        assert (found.kept_mib is not None) == (found.direction != "forward")
    if name == "memory":
        kept = {row.provider: row.kept_mib for row in rows}
        assert kept["vitfast fused"] < kept["timm"]


@pytest.mark.usefixtures("known_machine")
def test_a_deadline_leaves_cases_out_and_says_so() -> None:
    items = suites.plan(["layer_norm"], "cpu", "dry", dtypes=["float32"])
    session = suites.Session("cpu", "a test", Settings())
    found = session.run(items, deadline=0.0)
    assert found["rows"] == []
    late = [entry for entry in found["absent"] if entry["reason"] == "no time left for it"]
    assert [entry["provider"] for entry in late] == [item.title for item in items]


def test_shapes_of_the_command_line() -> None:
    items = suites.plan(["attention"], "cpu", shapes=["L=64,128", "B=1,2"], dtypes=["float32"])
    assert [item.title for item in items] == [
        f"attention B={B} L={L} H=12 E=64 float32" for L in (64, 128) for B in (1, 2)
    ]
    with pytest.raises(
        ValueError, match=r"'Q=3' does not fit attention; its axes and defaults: B=8 L=197 H=12 E=64; also: T"
    ):
        suites.plan(["attention"], "cpu", shapes=["Q=3"])
    with pytest.raises(ValueError, match="'x' is no whole number"):
        suites.plan(["attention"], "cpu", shapes=["L=x"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("machine"), "missing ['machine']"),
        (lambda c: c.update(more=1), "unknown ['more']"),
        (lambda c: c.update(schema=99), "schema is 99; this vitfast reads 2"),
        (lambda c: c["machine"].update(threads="two"), "machine.threads is 'two'; expected int"),
        (lambda c: c["rows"][0].pop("ms"), "rows[0]: missing ['ms']"),
        (lambda c: c["rows"][0].update(ms=True), "rows[0].ms is True"),
        (lambda c: c["rows"][0].update(dtype="int8"), "rows[0].dtype is 'int8'; allowed: float32"),
        (lambda c: c["rows"][0].update(ms_low=2.0), "ms_low <= ms <= ms_high does not hold"),
        (lambda c: c["rows"][0].update(ms=None), "all given or all null"),
        (lambda c: c["rows"][0].update(ms=None, ms_low=None, ms_high=None), "no note that says why"),
        (lambda c: c["rows"][0].update(ratio=2.0), "a ratio needs a best_peer"),
        (lambda c: c["rows"][0].update(floor_ms=math.inf), "numbers must be finite"),
        (lambda c: c["rows"].append(c["rows"][0]), "is there twice"),
    ],
)
def test_the_schema_names_what_is_wrong(damage: Any, message: str, tmp_path: Path) -> None:
    bad = json.loads(json.dumps(content(row())))
    schema.validate(bad)
    damage(bad)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message is compared below
        schema.write(tmp_path / "x.json", bad)
    assert message in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    schema.write(path, content(row()))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        schema.write(path, content(row(ms=2.0)))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: "):
        schema.read(path)


def test_check_fails_beyond_the_noise_only() -> None:
    before = content(ratio_row(2.0, 1.9, 2.1))
    verdicts = {
        ratio: compare.check(content(ratio_row(ratio, ratio - spread, ratio + spread)), before)[0].worse
        for ratio, spread in ((2.5, 0.1), (1.95, 0.01), (1.7, 0.3), (1.89, 0.005), (1.7, 0.1))[:-1]
    }
    assert verdicts == {2.5: False, 1.95: False, 1.7: False, 1.89: True}
    assert not compare.check(content(ratio_row(1.96, 1.9, 1.965)), content(ratio_row(2.0, 1.97, 2.1)))[0].worse  # 2 %
    with pytest.raises(ValueError, match="no row with a ratio in common"):
        compare.check(content(row()), before)


def test_differences_between_commits() -> None:
    def rows(ms: float) -> dict[str, Any]:
        return content(row(ms=ms), row("sdpa", 1.0))

    verdict = {ms: [v for _, _, v in compare.differences(rows(ms), rows(1.0))] for ms in (0.5, 1.05, 2.0)}
    assert verdict == {0.5: ["faster"], 1.05: ["same"], 2.0: ["slower"]}
    assert [r["ms"] for r in compare.quieter(rows(2.0), rows(1.0))["rows"]] == [1.0, 1.0]


def test_growth_is_fitted() -> None:
    rows = [row(ms=1e-6 * L**1.5, shape=f"B=2 L={L}", peak_mib=float(L**2)) for L in (64, 128, 256)]
    found = scaling.fits(rows)
    assert [(fit.axis, fit.quantity, fit.low, fit.high) for fit in found] == [("L", "ms", 64, 256)]
    assert (found[0].exponent, found[0].last) == pytest.approx((1.5, 1.5))
    assert "| ms | float32 | forward | tokens (L) | 64–256 | 1.50 (1.50) |" in report.growth_table(rows)
    assert scaling.fits(rows[:2]) == []
    model = [dataclasses.replace(r, op="model", shape=f"model=m B={2 * i + 1}") for i, r in enumerate(rows)]
    assert [(fit.axis, fit.quantity) for fit in scaling.fits(model)] == [("B", "ms"), ("B", "peak MiB")]
    fixed_cost = [row(ms=100.0 + L, shape=f"L={L}") for L in (1, 10, 10_000, 20_000)]
    assert scaling.fits(fixed_cost)[0].last > scaling.fits(fixed_cost)[0].exponent


def test_axes_that_move_together_are_one_series() -> None:
    rows = [row(ms=float(D), shape=f"B=2 D={D} F={4 * D}") for D in (64, 128, 256)]
    rows.append(row(ms=1.0, shape="B=2 D=512 F=512"))
    (panel,) = scaling.growth_panels(rows)
    assert (panel.axis, panel.rest, panel.sizes) == ("D", "B=2 F=4D", [64, 128, 256])


def test_threads_are_compared_with_one() -> None:
    rows = [row(ms=8.0 / n**0.5, shape=f"B=2 L=4 T={n}") for n in (1, 2, 4)]
    rows += [row("sdpa", 3.0, "B=2 L=4 T=2"), row("sdpa", 2.0, "B=2 L=4 T=4")]
    (gain,) = scaling.gains(rows)
    assert (gain.threads, gain.speed_up) == (4, pytest.approx(2.0))
    line = "| attention B=2 L=4 | float32 | forward | **vitfast cpu** | 8.00 | 4.00 | 4 | 2.00 | 50% |"
    assert line in report.threads_table(rows)
    assert scaling.fits(rows) == []
    assert [presets.thread_counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_sweeps_cover_every_axis() -> None:
    """What the cost is said to grow with, and how far."""
    reach = {
        "attention": {"L": (64, 4096), "E": (16, 256), "B": (1, 32)},
        "layer_norm": {"D": (64, 8192), "L": (64, 4097), "B": (1, 64)},
        "mlp": {"D": (64, 1024), "B": (1, 16)},
        "patch_embed": {"S": (224, 1024), "B": (1, 32), "D": (192, 1280)},
        "model": {"L": (197, 4097), "B": (1, 64), "D": (192, 768), "depth": (3, 24)},
        "train": {"L": (197, 1025), "B": (1, 16)},
    }
    for name, axes in reach.items():
        for device in ("cpu", "cuda"):
            items = suites.plan([name], device, "growth", dtypes=["float32"])
            assert len({item.title for item in items}) == len(items)
            rows = [row(shape=harness.shape_text(item.shape)) for item in items]
            found = {fit.axis: (fit.low, fit.high) for fit in scaling.fits(rows)}
            assert set(found) == set(axes)
            for axis, (low, high) in axes.items():
                assert device == "cuda" or found[axis] == (low, high)


def test_sizes_a_model_can_have() -> None:
    shape = {"model": "vit_tiny_patch16_224", "L": 577, "D": 128, "depth": 2}
    assert bench_model.overrides_of(shape) == {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 384}
    with pytest.raises(ValueError, match="L is 500; allowed: 1 more than a square, as 197 or 577"):
        bench_model.overrides_of(shape | {"L": 500})
    with pytest.raises(ValueError, match="D is 100; allowed: multiples of 64"):
        bench_model.overrides_of(shape | {"D": 100})


def test_report_and_plots_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = []
    for L in (64, 128, 256):
        rows.append(row(ms=L / 100, shape=f"B=1 L={L}", best_peer="sdpa", ratio=2.0, ratio_low=1.9, ratio_high=2.1))
        rows.append(row("sdpa", L / 50, f"B=1 L={L}", best_peer="sdpa", ratio=1.0, ratio_low=1.0, ratio_high=1.0))
        rows.append(failed(L))
    for B in (1, 2, 3):
        kept = dataclasses.replace(
            failed(1), op="memory", shape=f"model=m B={B}", provider="timm", note="", kept_mib=2.0 * B
        )
        rows.append(dataclasses.replace(kept, direction="both"))
    folder = tmp_path / "results" / "machine"
    schema.write(folder / "attention.json", content(*rows))
    document = tmp_path / "doc.md"
    document.write_text(
        "a\n<!-- measured -->\nold\n<!-- /measured -->\nb\n<!-- measured all -->\n<!-- /measured -->\nc\n"
    )
    assert main(["bench", "report", str(tmp_path / "results"), "--into", str(document)]) == 0
    assert {p.name for p in folder.iterdir()} == {
        "attention.json",
        "report.md",
        *(f"{name}.png" for name in ("growth-attention-float32", "floor", "roofline", "memory")),
    }
    text = document.read_text()
    assert text.startswith(
        "a\n<!-- measured -->\n\nTest CPU, 1 thread, 2026-01-01:\n\n| kept for backward, MiB an image | timm |"
    )
    assert "| B=1 L=64 | float32 | forward | 0.640 (0.576–0.704) | sdpa | 1.28 | 2.00 (1.90–2.10) | 78% |" in text
    assert "| ms | float32 | forward | tokens (L) | 64–256 | 1.00 (1.00) | 1.00 (1.00) |" in text
    assert "no number: bad, B=1 L=64 float32 forward: wrong: far off" in text
    assert "- Other: not installed; `pip install other`" in text
    assert "](results/machine/floor.png)" in text
    assert "old" not in text
    assert report.fill(text, tmp_path / "results", tmp_path) == text
    with pytest.raises(ValueError, match="no <!-- measured -->"):
        report.fill("nothing", tmp_path, tmp_path)
    with pytest.raises(ValueError, match="is not known"):
        report.fill("<!-- measured x -->\n<!-- /measured -->", tmp_path, tmp_path)


def failed(L: int) -> Row:
    return Row("attention", f"B=1 L={L}", "float32", "forward", "bad", False, note="wrong: far off")


def test_no_points_no_picture(tmp_path: Path) -> None:
    assert plots.draw(report.Machine(tmp_path, (content(),))) == []


@pytest.mark.parametrize("name", ["README.md", "docs/performance.md"])
def test_documents_are_up_to_date(name: str) -> None:
    """Each is what `vitfast bench report benchmarks/results --into README.md docs/performance.md` makes of it."""
    path = ROOT / name
    text = path.read_text()
    assert report.fill(text, ROOT / "benchmarks/results", path.parent) == text
    for file in (ROOT / "benchmarks/results").rglob("*.json"):
        schema.read(file)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = ["bench", "layer_norm", "--preset", "dry", "--dtype", "fp32", "--seconds", "0.001", "--threads", "1"]
    run += ["--direction", "forward", "--providers", "vitfast torch", "pytorch eager"]
    assert main([*run, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("add_layer_norm", "vitfast torch", "pytorch eager", "ratio", "copy", "Liger: needs a CUDA GPU"):
        assert word in printed
    saved = schema.read(tmp_path / "layer_norm-dry.json")
    assert (tmp_path / "layer_norm-dry.csv").read_text().count("\n") == 1 + len(saved["rows"])
    assert (tmp_path / "report.md").exists()

    def baseline(factor: float) -> str:
        path = tmp_path / f"baseline-{factor}.json"
        rows = [
            entry | {name: entry[name] * factor for name in ("ratio", "ratio_low", "ratio_high")}
            for entry in saved["rows"]
        ]
        schema.write(path, saved | {"rows": rows})
        return str(path)

    assert main([*run, "--check", baseline(1e-3)]) == 0
    assert "0 worse by more than the noise" in capsys.readouterr().out
    assert main([*run, "--check", baseline(1e3)]) == 1
    assert "worse: layer_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--shapes", "Q=1"], "does not fit attention"),
        (["attention", "--dtype", "int4"], "'int4' is no dtype"),
        (["report"], "report needs the folder"),
        (["report", "/nowhere"], "holds no result files"),
        (["mlp", "somewhere"], "go with `vitfast bench report` only"),
        (["mlp", "--check", "/nowhere.json"], "No such file"),
        (["mlp", "--threads", "0"], "--threads is 0"),
        (["mlp", "--seconds", "0"], "0 is not over zero"),
        (["softmax"], "invalid choice: 'softmax'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("vitfast: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_parity_sweep_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in parity.cases("cpu", ("float32",), dry=False)]
    assert len(names) == len(set(names))
    for r in range(16):
        assert any(f"L={16 + r} " in name for name in names)
    right = dict(parity.sweep("cpu", ("float32",), True, frozenset()))
    assert len(right) >= 8
    assert not any(right.values())
    attention = functools.partial(bench_attention.attention, scale=0.2)
    monkeypatch.setattr(bench_attention, "attention", attention)
    wrong = {name for name, reason in parity.sweep("cpu", ("float32",), True, frozenset()) if reason}
    assert wrong
    assert all(name.startswith("attention") for name in wrong)


def test_gpu_run_keeps_one_row_of_each() -> None:
    first, second = content(row(), row("sdpa")), content(row(ms=5.0), row(shape="B=2 L=4"))
    both = gpu.merged([first, second])
    schema.validate(both)
    assert [(r["provider"], r["shape"], r["ms"]) for r in both["rows"]] == [
        ("vitfast cpu", "B=1 L=4", 1.0),
        ("sdpa", "B=1 L=4", 1.0),
        ("vitfast cpu", "B=2 L=4", 1.0),
    ]
    assert len(both["absent"]) == 1
    assert gpu._with_exclusions(["--seconds", "1"], ["p q"]) == ["--seconds", "1", "--providers", "!p q"]
    assert gpu._with_exclusions(["--providers", "a"], ["b"]) == ["--providers", "!b", "a"]


def simulated(rng: random.Random, speed: float) -> Row:
    """Our row of one run on a busy machine: each round is slowed down as a whole, and each call in it by its own."""
    ours = Row("op", "B=1", "float32", "forward", "vitfast", True, floor_ms=0.1)
    peer = Row("op", "B=1", "float32", "forward", "peer", False, floor_ms=0.1)
    samples: dict[str, list[float]] = {"vitfast": [], "peer": []}
    for _ in range(harness.MIN_ROUNDS * 2):
        slow = math.exp(rng.gauss(0, 0.15)) * (2.0 if rng.random() < 0.1 else 1.0)  # other users
        samples["vitfast"].append(slow * math.exp(rng.gauss(0, 0.03)) / speed)
        samples["peer"].append(1.4 * slow * math.exp(rng.gauss(0, 0.03)))
    harness.add_times([ours, peer], samples)
    return ours


def test_two_runs_of_the_same_code_agree_within_the_spread_shown() -> None:
    """On 500 simulated pairs of runs: the ranges of the ratios touch, `--check` is silent, and a real loss is seen."""
    rng = random.Random(0)
    pairs = [(simulated(rng, 1.0), simulated(rng, 1.0)) for _ in range(500)]
    apart = sum(a.ratio_high < b.ratio_low or b.ratio_high < a.ratio_low for a, b in pairs)
    alarms = sum(compare.check(content(a), content(b))[0].worse for a, b in pairs)
    seen = sum(compare.check(content(simulated(rng, 0.85)), content(simulated(rng, 1.0)))[0].worse for _ in range(500))
    assert apart <= 0.05 * len(pairs)
    assert alarms <= 0.02 * len(pairs)
    assert seen >= 0.9 * len(pairs)


@pytest.mark.slow
def test_two_real_runs_agree_and_a_slower_one_shows() -> None:
    """The same product twice in one run, beside one of twice the work: twins differ by less than the spread, at most 3 tries."""
    x = torch.randn(192, 192)
    twins = [Provider(name, lambda x: 2 * (x @ x)) for name in ("one", "other")]
    double = Provider("double", lambda x: (x @ x) + (x @ x))
    work = {"forward": [Work(1, 1)]}
    case = doubling([*twins, double], inputs=lambda: {"x": x}, reference=lambda x: 2 * (x @ x), work=work, batched=())
    for _ in range(3):
        one, other, slower = harness.run_case(dataclasses.replace(case, grads=()), MACHINE, Settings(seconds=1.0))
        twins_agree = max(one.ratio_low, other.ratio_low) <= 1 <= max(one.ratio_high, other.ratio_high)
        if twins_agree and slower.ratio_high < 0.85:
            return
    pytest.fail(f"{one.ratio_low}–{one.ratio_high}, {other.ratio_low}–{other.ratio_high}, {slower.ratio_high}")


def test_one_call_over_the_limit_gets_a_note_and_no_time() -> None:
    def sleepy(x: Tensor) -> Tensor:
        time.sleep(0.03)
        return 2 * x

    quick = Provider("quick", lambda x: 2 * x)
    settings = Settings(seconds=0.001, longest=0.02, directions=("forward",))
    rows = harness.run_case(doubling([quick, Provider("slow one", sleepy)]), MACHINE, settings)
    assert rows[0].ms is not None
    assert rows[1].ms is None
    assert rows[1].note.startswith("left out: one call takes 0.0 s, the limit is 0.02")
    schema.validate(content(*rows))


def test_a_peer_that_cannot_be_made_costs_only_its_row() -> None:
    def broken() -> Provider:
        raise ImportError("no libpeer.so")

    providers = [Provider("fine", lambda x: 2 * x), peers.attempt("broken", broken)]
    rows = harness.run_case(doubling(providers), MACHINE, Settings(seconds=0.001, directions=("forward",)))
    assert [(r.provider, r.ms is None, r.note) for r in rows] == [
        ("fine", False, ""),
        ("broken", True, "failed: ImportError: no libpeer.so"),
    ]


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


@pytest.mark.usefixtures("known_machine")
def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run_case, calls = suites.run_case, []

    def interrupted(*args: Any) -> list[Row]:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_case(*args)

    monkeypatch.setattr(suites, "run_case", interrupted)
    command = ["bench", "layer_norm", "--preset", "dry", "--seconds", "0.001", "--direction", "forward"]
    command += ["--providers", "vitfast torch", "pytorch eager", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "interrupted; the tables have 1 of 4 cases" in capsys.readouterr().err
    saved = schema.read(tmp_path / "layer_norm-dry.json")
    assert {entry["op"] for entry in saved["rows"]} == {"layer_norm"}
    assert sum(entry["reason"] == "stopped before it was done" for entry in saved["absent"]) == 3
    assert (tmp_path / "report.md").exists()


@pytest.mark.usefixtures("known_machine")
def test_threads_are_an_axis() -> None:
    used: list[int] = []
    few = Settings(seconds=0.001, directions=("forward",), providers=("pytorch eager",), report=lambda text: None)
    items = suites.plan(["layer_norm"], "cpu", shapes=["B=1", "L=2", "D=8", "T=1,2"], dtypes=["float32"])[:2]
    session = suites.Session("cpu", "a test", few)
    original = suites.run_case

    def noted(*args: Any) -> list[Row]:
        used.append(torch.get_num_threads())
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "run_case", noted)
        rows = session.run(items)["rows"]
    assert used == [1, 2]
    assert torch.get_num_threads() == 1
    assert [entry["shape"] for entry in rows] == ["B=1 L=2 D=8 T=1", "B=1 L=2 D=8 T=2"]


def test_our_own_wrong_result_is_an_error(capsys: pytest.CaptureFixture) -> None:
    wrong = dataclasses.replace(row(), ms=None, ms_low=None, ms_high=None, note="wrong: result is off")
    peer = dataclasses.replace(wrong, provider="peer", ours=False)
    assert not bench._say_wrong(content(row(), peer))
    assert bench._say_wrong(content(wrong))
    assert "attention B=1 L=4 float32 forward vitfast cpu: wrong: result is off" in capsys.readouterr().err


def test_the_summary_is_of_whole_models() -> None:
    def whole(provider: str, ms: float, **values: Any) -> Row:
        made = row(provider, ms, "model=vit_base_patch16_224 B=8", **values)
        return dataclasses.replace(made, op="model", ours=provider == "vitfast")

    won = {"best_peer": "OpenVINO", "ratio": 1.5, "ratio_low": 1.4, "ratio_high": 1.6}
    lost = {"best_peer": "OpenVINO", "ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6}
    rows = [whole("vitfast", 100.0, **won), whole("timm", 400.0), whole("OpenVINO", 150.0)]
    slow = dataclasses.replace(whole("vitfast", 300.0, **lost), dtype="bfloat16")
    rows += [slow, dataclasses.replace(whole("OpenVINO", 150.0), dtype="bfloat16")]
    machine = report.Machine(Path(), (content(*rows),))
    text = standing.summary(machine)
    assert "| inference | ViT-B/16, 8 images, fp32 | 100 | 400 | OpenVINO 150 | 1.50 (1.40–1.60) |" in text
    text = standing.standing(machine)
    assert "| model | fp32 | forward | 1 | 0 | 0 | 1.50 |" in text
    assert "| model | model=vit_base_patch16_224 B=8 | bf16 | forward | OpenVINO | 0.50 (0.40–0.60) |" in text
    assert standing.model_text("vit_large_patch14_336") == "ViT-L/14 at 336 px"
    assert standing.model_text("resnet20") == "resnet20"
