"""Switches for the whole suite: Triton's interpreter where there is no GPU, the slow and gpu markers, fixtures of many files."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised float tensor starts as NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """What is this small is no faster on more threads, and much slower where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that the benchmarks take to measure the machine."""
    from bench_checks import MACHINE

    monkeypatch.setattr("vitfast.benchmarks.suites.measure", lambda device, dtypes: MACHINE)
