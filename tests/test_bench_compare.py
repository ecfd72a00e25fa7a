"""Two runs compared: noise is no difference, and a real loss is seen."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_checks import MACHINE, content, doubling, row

from vitfast.benchmarks import compare, harness, schema
from vitfast.benchmarks.harness import Provider, Settings, Work
from vitfast.benchmarks.machine import name_of
from vitfast.benchmarks.schema import Row

pytestmark = pytest.mark.usefixtures("one_thread")


def ratio_row(ratio: float, low: float, high: float) -> Row:
    return row(best_peer="sdpa", ratio=ratio, ratio_low=low, ratio_high=high)


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


def test_a_folder_of_machines_gives_this_machines_baseline(tmp_path: Path) -> None:
    here = {"kind": "cpu", "name": name_of("cpu"), "threads": torch.get_num_threads()}
    for folder, machine, date in (("a", {"name": "another"}, "2030-01-01"), ("b", here, "2020-01-01")):
        (tmp_path / folder).mkdir()
        result = content(row())
        schema.write(tmp_path / folder / "smoke.json", result | {"machine": result["machine"] | machine, "date": date})
    found, note = compare.baseline(tmp_path, "smoke.json", "cpu")
    assert (found["machine"]["name"], note) == (here["name"], "")
    (tmp_path / "b" / "smoke.json").unlink()
    found, note = compare.baseline(tmp_path, "smoke.json", "cpu")
    assert found["machine"]["name"] == "another"
    assert "no smoke.json of this machine" in note
    with pytest.raises(FileNotFoundError, match=r"no folder in it has a mlp\.json"):
        compare.baseline(tmp_path, "mlp.json", "cpu")
