"""The multiply-add rate of csrc/cpu/peak.cpp on every instruction set this CPU runs, and what floors make of it."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
from csrc_checks import BEST, C, on_each

from vitfast.benchmarks import machine, peak

SECONDS = 0.01
# No core runs faster than 7 GHz or has more than four units for vectors of so many lanes; a tile's product takes 16 cycles.
CYCLES, UNITS = 7e9, 4
LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512_vnni": 16, "avx512_bf16": 16, "amx": 16}
MOST_PER_LANE = {"float32": 2, "bfloat16": 4, "int8": 8}
MOST_OF_TILES = {"bfloat16": 2 * 16 * 32, "int8": 2 * 16 * 64}  # operations a cycle

capability = on_each(LANES, autouse=False)


@pytest.mark.parametrize("dtype", peak.DTYPES)
def test_rates_are_those_of_a_chip(capability: str, dtype: str) -> None:
    start = time.perf_counter()
    rate = C.multiply_add_rate(dtype, SECONDS)
    assert time.perf_counter() - start >= SECONDS
    a_cycle = UNITS * LANES[capability] * MOST_PER_LANE[dtype]
    if capability == "amx":
        a_cycle = MOST_OF_TILES.get(dtype, a_cycle)
    assert math.isfinite(rate)
    assert 1e6 < rate < a_cycle * CYCLES * torch.get_num_threads()


@pytest.mark.parametrize(
    ("dtype", "seconds", "message"),
    [
        ("float64", 0.1, r'dtype is "float64"; allowed: \[float32, bfloat16, int8\]'),
        ("float32", 0.0, "seconds is 0; allowed: over 0 up to 60"),
        ("float32", math.nan, "seconds is nan; allowed: over 0"),
        ("float32", 1e9, r"seconds is 1e\+09; allowed: over 0 up to 60"),
    ],
)
def test_refusals(dtype: str, seconds: float, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        C.multiply_add_rate(dtype, seconds)


def test_floors_take_the_higher_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    products = {torch.float32: 3.0, torch.bfloat16: 1.0, torch.float16: 0.5}
    monkeypatch.setattr(machine, "_copy_ms", lambda size, device: 1.0)
    monkeypatch.setattr(machine, "matrix_tflops", lambda dtype, device: products[dtype])
    monkeypatch.setattr(machine, "chip_tflops", lambda names: {"float32": 2.0, "bfloat16": 5.0})
    rates = machine.rates("cpu", tuple(products))
    assert rates["matrix_tflops"] == {"float32": 3.0, "bfloat16": 5.0, "float16": 0.5}
    assert rates["product_tflops"] == {"float32": 3.0, "bfloat16": 1.0, "float16": 0.5}


def test_chip_rates_by_name() -> None:
    assert list(peak.chip_tflops(seconds=0.01)) == ["float32", "bfloat16", "int8"]
    assert list(peak.chip_tflops(["float16", "bfloat16"], seconds=0.01)) == ["bfloat16"]
    assert peak.instruction_set() == BEST


def test_an_older_extension_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "vitfast_C", SimpleNamespace())
    assert peak.chip_tflops() == {}
    assert peak.instruction_set() is None


@pytest.mark.parametrize(
    ("caches", "threads", "expected"),
    [
        ([0.03, 0.03, 1.0, 32.0], 2, 64.0),  # twice the last-level cache
        ([0.05, 0.06, 2.0, 480.0], 2, 128.0),  # where that is very large: well over what the cores have for themselves
        ([0.05, 0.06, 2.0, 480.0], 64, 256.0),
        ([], 4, 64.0),
    ],
)
def test_inputs_in_turn_miss_the_caches_that_count(
    monkeypatch: pytest.MonkeyPatch, caches: list[float], threads: int, expected: float
) -> None:
    monkeypatch.setattr(machine, "_cpu_caches_mib", lambda: caches)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert machine.cold_mib("cpu") == expected
