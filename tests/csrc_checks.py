"""What tests of the raw C++ kernels share: the extension, and a run on each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("vitfast._C", reason="the extension is not built: python setup.py build_ext --inplace")
C = torch.ops.vitfast_C

CAPABILITIES = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
BEST = C.cpu_capability()
HALVES = [torch.float32, torch.bfloat16]


def on_each(capabilities: Iterable[str], autouse: bool = True) -> Any:
    """A fixture for a test file to hold by the name ``capability``: each test runs on every one that the CPU has."""

    @pytest.fixture(autouse=autouse, params=list(capabilities))
    def capability(request: pytest.FixtureRequest) -> Iterator[str]:
        try:
            C.set_cpu_capability(request.param)
        except RuntimeError as error:  # names the best that this CPU can run
            pytest.skip(str(error))
        torch.manual_seed(0)
        yield request.param
        C.set_cpu_capability(BEST)

    return capability
