"""`make gpu` without a GPU: who takes part, how the sweep is shared out, and that nothing runs on when time is up."""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_checks import content, row

from vitfast.benchmarks import bench_attention, bench_model, bench_train, gpu, parity, schema, suites

TRAINED = sorted({str(shape["model"]) for shape in bench_train.SHAPES["cuda"] if "model" in shape})


@pytest.mark.parametrize("name", TRAINED)
def test_timm_takes_the_weights_of_every_model_trained_on_a_gpu(name: str) -> None:
    models = bench_model.Models({"model": name, "B": 1, "depth": 1}, "float32", "cpu")
    images = models.images()
    with torch.no_grad():
        ours, theirs = models.ours(images), models.timm()(images)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_models_run_beside_peers_that_exist() -> None:
    """A name that nobody has would silently leave its rows out."""
    known: set[str] = set()
    for suite in ("model", "train"):
        case = suites.plan([suite], "cpu", "dry", dtypes=["float32"])[0].case("cpu")
        known |= {provider.name for provider in case.providers()}
    assert set(gpu.MODELS) <= known


def test_a_part_out_of_time_takes_its_children_along(tmp_path: Path) -> None:
    """And what it had said until then stays."""
    run = gpu.Run(dry=True, log=tmp_path / "log.txt")
    child = "import time; time.sleep(60)"
    started = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    parent = f"import subprocess, sys; p = {started}; print(p.pid, flush=True); p.wait()"
    code, output = run.process([sys.executable, "-c", parent], 5.0)
    assert code == 124
    state, deadline = Path(f"/proc/{int(output)}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child runs on"
        time.sleep(0.05)
    assert output.strip() in run.log.read_text()


def test_shares_of_the_sweep_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "_check", lambda *_: "")
    monkeypatch.setattr(parity.Gate, "of", classmethod(lambda *_: None))

    def names(share: tuple[int, int]) -> list[str]:
        return [name for name, _ in parity.sweep("cpu", ("float32",), True, frozenset(), share)]

    shares = [names((i, 3)) for i in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(names((0, 1)))
    assert all(shares)


def test_the_sweep_has_every_op_with_a_backend_on_the_gpu() -> None:
    """int8 is the CPU's."""
    from vitfast.ops.dispatch import TABLE

    checked = {case.op for _, case in parity.cases("cpu", ("float32",), True)}
    assert set(TABLE) - checked == {"int8_linear"}


@pytest.mark.parametrize(("share", "code"), [(0, 1), (1, 0)])
def test_a_failed_share_fails_the_run(share: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Share 0 has a failure, share 1 has none, and a share that says nothing at its end has failed, too."""
    said = {
        "0/2": "FAILED attention: wrong\nparity on cpu: 3 passed, 1 failed",
        "1/2": "parity on cpu: 4 passed, 0 failed",
    }
    run = gpu.Run(dry=True, log=tmp_path / "log.txt")
    monkeypatch.setattr(gpu.Run, "process", lambda self, command, *_: (code, said[command[4]]))
    assert gpu.sweep(run, f"{share}/2") == ((3, 1) if share == 0 else (4, 0))
    assert [line for line in run.lines if line.startswith("FAILED")] == ["FAILED attention: wrong"] * (share == 0)
    monkeypatch.setattr(gpu.Run, "process", lambda self, *_: (124, "half a line"))
    assert gpu.sweep(run, f"{share}/2") == (0, 1)
    assert run.failed


@pytest.mark.usefixtures("one_thread")
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
