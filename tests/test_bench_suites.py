"""The suites: each runs, has the names that others use, and takes the shapes, threads and time that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vitfast.benchmarks import bench_attention, bench_model, gpu, options, schema, stopwatch, suites
from vitfast.benchmarks.harness import Settings, Work
from vitfast.benchmarks.schema import Row

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_sizes_a_model_can_have() -> None:
    shape = {"model": "vit_tiny_patch16_224", "L": 577, "D": 128, "depth": 2}
    assert bench_model.overrides_of(shape) == {"depth": 2, "embed_dim": 128, "num_heads": 2, "img_size": 384}
    with pytest.raises(ValueError, match="L is 500; allowed: 1 more than a square, as 197 or 577"):
        bench_model.overrides_of(shape | {"L": 500})
    with pytest.raises(ValueError, match="D is 100; allowed: multiples of 64"):
        bench_model.overrides_of(shape | {"D": 100})


def test_work_by_hand() -> None:
    case = bench_attention.case("attention", {"B": 2, "L": 3, "H": 5, "E": 8}, "bfloat16", "cpu")
    tensor = 2 * 3 * 5 * 8 * 2
    assert case.work["forward"] == [Work(4 * tensor, 2 * 2 * 5 * (2 * 3 * 3 * 8))]
    assert case.work["backward"] == [Work(8 * tensor, 5 * 2 * 5 * (2 * 3 * 3 * 8))]
    from vitfast.models.table import CONFIGS

    parts = bench_model.forward_work(CONFIGS["vit_base_patch16_224"], 1, 2)
    assert sum(part.flops for part in parts) == pytest.approx(2 * 17.58e9, rel=0.01)  # timm: 17.58 GMACs
