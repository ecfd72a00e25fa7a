"""Tile sizes, as data: a deterministic choice by shape, dtype and architecture, each with its reason.

Nothing here was timed on a GPU yet: choices follow from registers, shared memory and useful share of the tile, as
`python -m vitfast.kernels.aot` prints them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowConfig:
    """A tile of whole rows [rows, width], width the next power of two; `programs` per multiprocessor where it loops."""

    rows: int
    width: int
    warps: int
    programs: int = 0


@functools.cache
def row_config(columns: int) -> RowConfig:
    """LayerNorm forward: about 16 elements per thread in each operand, so that branch, scale and weight stay in registers."""
    width = next_power_of_two(columns)
    if width <= 2048:
        return RowConfig(rows=min(2048 // width, 32), width=width, warps=4)
    return RowConfig(rows=1, width=width, warps=min(width // 512, 16))


@functools.cache
def backward_rows(columns: int) -> RowConfig:
    """LayerNorm backward: three column sums live in registers too, so 8 elements per thread; 16 only at the widest.

    At about 96 registers per thread 20 warps are resident on a multiprocessor; more programs than that would wait for a second turn.
    """
    width = next_power_of_two(columns)
    if width <= 1024:
        return RowConfig(rows=min(1024 // width, 32), width=width, warps=4, programs=5)
    warps = min(width // 256, 16)
    return RowConfig(rows=1, width=width, warps=warps, programs=20 // warps)


@dataclass(frozen=True)
class ActivationConfig:
    block: int  # elements per program, forward
    rows: int  # tile of the backward kernel
    columns: int
    warps: int
    programs: int  # per multiprocessor, backward


# 256 columns are one 16-byte load per lane of 16-bit numbers; 8 rows give 16 elements per thread.
ACTIVATION = ActivationConfig(block=2048, rows=8, columns=256, warps=4, programs=8)
