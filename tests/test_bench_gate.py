"""What gets no number, only a reason: a wrong result, a call that fails or takes too long, a GPU that is lost."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import tolerances
import torch
from bench_checks import MACHINE, content, doubling, row
from torch import Tensor

from vitfast.benchmarks import gate, harness, peers, schema
from vitfast.benchmarks.harness import Provider, Settings
from vitfast.cli import bench

pytestmark = pytest.mark.usefixtures("one_thread")


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
        gate.Gate.of(case.reference, case.inputs(), ("x",), (), 2, 0.0)


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


def test_a_broken_gpu_ends_the_run_and_names_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    harness.raise_if_lost("cpu", "p", ValueError("x"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    harness.raise_if_lost("cuda", "p", ValueError("x"))
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(harness.DeviceLost, match=r"^vitfast triton: ValueError: x"):
        harness.raise_if_lost("cuda", "vitfast triton", ValueError("x"))


def test_our_own_wrong_result_is_an_error(capsys: pytest.CaptureFixture) -> None:
    wrong = dataclasses.replace(row(), ms=None, ms_low=None, ms_high=None, note="wrong: result is off")
    peer = dataclasses.replace(wrong, provider="peer", ours=False)
    assert not bench._say_wrong(content(row(), peer))
    assert bench._say_wrong(content(wrong))
    assert "attention B=1 L=4 float32 forward vitfast cpu: wrong: result is off" in capsys.readouterr().err
