"""`vitfast bench all`: nothing is cut, time is kept as far as that goes, and a second run goes on where the first stopped."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import bench_checks
import pytest

from vitfast.benchmarks import everything, machine, pace, schema, suites
from vitfast.benchmarks.everything import STEPS, Everything, Step
from vitfast.benchmarks.pace import Pace
from vitfast.benchmarks.schema import Row
from vitfast.cli.info import cpu_model
from vitfast.cli.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
MACHINE = bench_checks.MACHINE | {"name": cpu_model(), "product_tflops": {"float32": 0.1, "bfloat16": 0.1}}
SHORT = (Step("layer_norm", "dry", 1), Step("patch_embed", "dry", 1), Step("attention", "threads", 1))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases made, in order: each with one row, at once, on a machine that is known."""
    titles: list[str] = []

    def run_case(case: Any, machine: Any, settings: Any) -> list[Row]:
        titles.append(case.title)
        shape = " ".join(f"{axis}={size}" for axis, size in case.shape.items())
        made = Row(case.op, shape, case.dtype, "forward", "vitfast cpu", True, 1.0, 0.9, 1.1, 5, 1, 1, 0.5, 0.5)
        return [dataclasses.replace(made, note=f"{settings.seconds:g}")]

    monkeypatch.setattr(suites, "run_case", run_case)
    monkeypatch.setattr(everything, "measure", lambda device, dtypes: dict(MACHINE))
    monkeypatch.setattr(everything, "same_code", lambda commit, dirty: True)
    monkeypatch.setattr(everything, "STEPS", SHORT)
    return titles


def run(folder: Path, **options: Any) -> list[dict[str, Any]]:
    return Everything(folder, "cpu", "vitfast bench all", steps=SHORT, **options).run()


def test_the_plan_is_whole() -> None:
    """Every suite, every sweep that issue and README promise, each file once; the minutes are those of the default."""
    assert len({step.file for step in STEPS}) == len(STEPS)
    assert {step.suite for step in STEPS if step.preset == "standard"} == set(suites.SUITES)
    assert {step.suite for step in STEPS if step.preset == "threads"} >= {"model", "attention"}
    swept = {step.suite for step in STEPS if step.preset == "growth"}
    assert swept == {"model", "train", "attention", "mlp", "layer_norm", "patch_embed"}
    assert sum(step.minutes for step in STEPS) == pytest.approx(everything.MINUTES)
    for step in STEPS:
        items = step.items("cpu")
        assert items
        assert len({item.title for item in items}) == len(items)
    growth = {item.title for item in Step("model", "growth", 1).items("cpu")}
    for shape in ("B=1 L=197", "B=1 L=4097", "B=64"):
        for dtype in ("float32", "bfloat16"):
            assert f"model model=vit_tiny_patch16_224 {shape} {dtype}" in growth


def test_a_second_run_makes_what_is_missing(tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture) -> None:
    first = run(tmp_path)
    count = len(made)
    assert count == 4 + 4 + 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "layer_norm-dry.json",
        "patch_embed-dry.json",
        "attention-threads.json",
    }
    assert run(tmp_path) == first
    assert len(made) == count
    assert "layer_norm-dry.json: done before, kept" in capsys.readouterr().err
    content = schema.read(tmp_path / "patch_embed-dry.json")
    content["rows"] = content["rows"][:3]
    content["absent"].append({"provider": made[7], "reason": "stopped before it was done", "install": ""})
    schema.write(tmp_path / "patch_embed-dry.json", content)
    (tmp_path / "attention-threads.json").unlink()
    assert [c["rows"] for c in run(tmp_path)] == [c["rows"] for c in first]
    assert made[count:] == [made[7], *made[8:count]]
    assert all("stopped" not in entry["reason"] for entry in schema.read(tmp_path / "patch_embed-dry.json")["absent"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"machine": MACHINE | {"name": "Another CPU"}}, "another machine (Another CPU)"),
        ({"machine": MACHINE | {"threads": 7}}, "measured with 7 threads"),
        ({"preset": "standard"}, "its preset is standard"),
        ({"versions": {"torch": "1.0"}}, "its versions of Python or packages differ"),
    ],
)
def test_results_of_something_else_are_not_kept(
    change: dict[str, Any], reason: str, tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path)
    path = tmp_path / "layer_norm-dry.json"
    schema.write(path, schema.read(path) | change)
    del made[:]
    capsys.readouterr()
    run(tmp_path)
    assert len(made) == 4
    said = capsys.readouterr().err
    assert "layer_norm-dry.json is replaced: it" in said
    assert reason in said


def test_other_code_is_measured_again(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr(everything, "same_code", lambda commit, dirty: False)
    count = len(made)
    run(tmp_path)
    assert len(made) == 2 * count


def git(folder: Path, *command: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", "-C", str(folder), *identity, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_results_and_documents_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmarks/machine.py", "benchmarks/results/a.json", "docs/a.md", "vitfast/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "benchmarks/machine.py"))
    assert machine.same_code(commit, False)
    (tmp_path / "benchmarks/results/a.json").write_text("2")
    (tmp_path / "docs/a.md").write_text("2")
    assert machine.origin("x")["dirty"] is False
    git(tmp_path, "commit", "-qam", "results")
    assert machine.same_code(commit, False)
    assert not machine.same_code(commit, True)
    (tmp_path / "vitfast/a.py").write_text("2")
    assert machine.origin("x")["dirty"] is True
    assert not machine.same_code(commit, False)
    git(tmp_path, "commit", "-qam", "code")
    assert not machine.same_code(commit, False)
    assert not machine.same_code("0" * 40, False)
    assert not machine.same_code(None, None)


def test_ctrl_c_and_on(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run_case = suites.run_case

    def interrupted(*args: Any) -> list[Row]:
        if len(made) == 6:
            raise KeyboardInterrupt
        return run_case(*args)

    command = ["bench", "all", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(suites, "run_case", interrupted)
        assert main(command) == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err
    assert (tmp_path / "report.md").exists()
    assert main(command) == 0
    assert len(made) == len(set(made)) == 10
    assert (tmp_path / "results.csv").read_text().count("\n") == 1 + 10
    rows = [row for file in tmp_path.glob("*.json") for row in json.loads(file.read_text())["rows"]]
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "all needs a folder for its result files: vitfast bench all --out DIR"),
        (["--out", "x", "--shapes", "B=1", "--against", "HEAD"], "--shapes, --against cannot go with all"),
        (["--out", "x", "--preset", "growth"], "--preset can only be dry"),
        (["--out", "/proc/x"], "/proc/x"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "all", *arguments]) == 2
    assert message in capsys.readouterr().err


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("rest", "expected"), [(1.0, 60.0), (2.0, 60.0), (9.0, 20 * (9.0 + 0.75)), (0.01, 20 * 6.01)])
def test_pace(rest: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 cases of three passes in a minute, where a case takes ``rest`` seconds beside its timing."""
    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    keeper = Pace(clock.now + 60, fewest=0.25, most=2.0)
    for left in range(20, 0, -1):
        seconds = keeper.seconds(left)
        assert 0.25 <= seconds <= 2.0
        clock.now += rest + 3 * seconds
        keeper.learn(rest + 3 * seconds, seconds, 3)
    assert clock.now - 100 == pytest.approx(min(expected, 20 * (rest + 6)), rel=0.1) or rest == 0.01
