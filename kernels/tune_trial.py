"""One candidate under tuning: whether it is right, whether it fits the chip, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction

MARGIN = 0.98  # what is new wins below it; two measurements of one kernel differ by about 2 %


@dataclass(frozen=True)
class Setting:
    """Where a tuning run measures, and under which options."""

    on: str  # the device
    arch: int
    about: str  # machine, date and versions, for a row's reason
    dry: bool  # through the interpreter, at tiny sizes


@dataclass(frozen=True)
class Run:
    """Launches of one kernel's family at one shape, and the tensors that they write."""

    launch: Callable[[], Any]
    outputs: list[torch.Tensor]

    def results(self) -> list[torch.Tensor]:
        """Copies of the outputs, which are NaN before: what a tile leaves out shows."""
        for out in self.outputs:
            out.fill_(float("nan"))
        self.launch()
        return [out.clone() for out in self.outputs]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Alike up to the rounding of one step between; a wrong tile is off by far more."""
    pairs = zip(found, expected, strict=True)
    return all(bool((f.float() - e.float()).norm() <= 0.02 * e.float().norm()) for f, e in pairs)


@contextmanager
def launched() -> Iterator[list[Any]]:
    """The compiled kernels of all launches inside; none in the interpreter, which compiles nothing."""
    kernels: list[Any] = []
    run = JITFunction.run

    def recorded(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, **kwargs))
        return kernels[-1]

    with mock.patch.object(JITFunction, "run", recorded):
        yield kernels


def why_not(results: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor]) -> str | None:
    """Why a candidate is left out, or None."""
    try:
        with launched() as kernels:
            found = results()
    except (OutOfResources, PTXASError, CompilationError) as error:
        return f"does not fit: {type(error).__name__}"
    except RuntimeError as error:
        if "PassManager" not in str(error):  # a pass of the compiler gave up; anything else is a fault of ours
            raise
        return "does not compile"
    if any(kernel.n_spills for kernel in kernels):
        return "spills"
    return None if close(found, expected) else "wrong result"


def microseconds(run: Callable[[], object], dry: bool) -> float:
    """Median of one run, with the L2 cache cleared before each."""
    if dry:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    return 1000 * float(triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median"))
