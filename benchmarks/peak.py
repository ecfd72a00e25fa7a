"""The CPU's own limit: multiply-adds a second on registers alone (csrc/cpu/peak.cpp), on all of PyTorch's threads.

Libraries may stay far below it: where a chip has matrix tiles, those that do not use them reach a third of it or less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vitfast import ops

DTYPES = ("float32", "bfloat16", "int8")
_ROUNDS = 4  # the best counts: another process may take a part of one


def chip_tflops(dtypes: Iterable[str] = DTYPES, seconds: float = 1.0) -> dict[str, float]:
    """dtype -> 1e12 operations a second, a multiply-add being two; those of ``dtypes`` that the chip's rate is known for.

    Empty without the C++ extension. ``seconds``: for all of DTYPES together.
    """
    measure = _raw("multiply_add_rate")
    if measure is None:
        return {}
    each = seconds / len(DTYPES) / _ROUNDS
    found = (name for name in dtypes if name in DTYPES)
    return {name: round(max(measure(name, each) for _ in range(_ROUNDS)) / 1e12, 4) for name in found}


def instruction_set() -> str | None:
    """The one our kernels use here, as "avx512_bf16"; None without the C++ extension."""
    name = _raw("cpu_capability")
    return None if name is None else str(name())


def _raw(function: str) -> Any:
    """A function of the extension; None where the library is missing, or older than these sources."""
    if not ops.extension_status()["_C"]["loaded"]:
        return None
    return getattr(torch.ops.vitfast_C, function, None)
