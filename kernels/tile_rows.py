"""The rows of tile_table.py: what they may say, and which of them fits a launch.

A function of configs.py that is `tuned` takes the first row that fits its arguments, and follows its own rule where none
does. What the kernels refuse (attention_why_not) is asked before, so no row brings it back.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from .tile_table import ROWS

C = TypeVar("C")
DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("ieee", "tf32")
WARPS = (1, 2, 4, 8, 16)
WALKING = ("bias_gradient", "layer_norm_backward")  # their programs per multiprocessor walk over all there is to do


class Tuned(Generic[C]):
    """A rule of configs.py with the table in front of it; called with the rule's arguments, by position."""

    def __init__(self, kernel: str, kind: type[C], rule: Callable[..., C]) -> None:
        self.kernel, self.kind, self.rule = kernel, kind, rule
        self.arguments = tuple(inspect.signature(rule).parameters)
        self.choose = functools.cache(self._choose)

    def __call__(self, *arguments: Any) -> C:
        return self.choose(*arguments)

    def _choose(self, *arguments: Any) -> C:
        given = dict(zip(self.arguments, arguments, strict=True))
        for row in rows():
            if row.kernel == self.kernel and row.fits(given):
                return row.config
        return self.rule(*arguments)


KERNELS: dict[str, Tuned] = {}


def tuned(kernel: str, kind: type[C]) -> Callable[[Callable[..., C]], Tuned[C]]:
    """Decorates the rule for `kernel`, which returns a `kind`."""

    def decorate(rule: Callable[..., C]) -> Tuned[C]:
        KERNELS[kernel] = Tuned(kernel, kind, rule)
        return KERNELS[kernel]

    return decorate


@dataclasses.dataclass(frozen=True)
class TileRow:
    """A row of tile_table.py."""

    kernel: str
    where: dict[str, Any]
    config: Any
    reason: str

    def fits(self, given: dict[str, Any]) -> bool:
        """given: at least the arguments of the kernel's function, by name."""
        return all(_holds(value, given[name]) for name, value in self.where.items())


def _holds(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, tuple):
        first, last = wanted
        return first <= value and (last is None or value <= last)
    return wanted == (str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value)


def _is_range(value: Any) -> bool:
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    first, last = value
    return type(first) is int and first >= 1 and (last is None or (type(last) is int and last >= first))


def _is_power(value: Any, least: int) -> bool:
    return type(value) is int and value >= least and value & (value - 1) == 0


def _are_chunks(value: tuple[Any, ...]) -> bool:
    present = [n for n in value if n != 0]
    return bool(present) and value[: len(present)] == tuple(present) and all(_is_power(n, 16) for n in present)


def _check(kernel: str, name: str, value: Any, right: bool, allowed: str) -> None:
    if not right:
        raise ValueError(f"tile_table.py, {kernel}: {name} is {value!r}; allowed is {allowed}")


def _check_names(kernel: str, name: str, found: dict, needed: set[str], possible: set[str]) -> None:
    names = set(found)
    _check(kernel, name, sorted(names), needed <= names <= possible, f"exactly {sorted(possible)}")


def _check_where(kernel: str, where: dict[str, Any]) -> None:
    arguments = set(KERNELS[kernel].arguments)
    _check_names(kernel, "where", where, arguments, arguments)
    for name, value in where.items():
        if name == "arch":
            _check(kernel, name, value, type(value) is int and value > 0, "one architecture, as 90")
        elif name == "dtype":
            _check(kernel, name, value, value in DTYPES, f"one of {DTYPES}")
        elif name == "precision":
            allowed = PRECISIONS if where["dtype"] == "float32" else PRECISIONS[:1]
            _check(kernel, name, value, value in allowed, f"one of {allowed} with {where['dtype']}")
        elif name in ("biased", "prepared", "wide_pixels"):
            _check(kernel, name, value, type(value) is bool, "True or False")
        else:
            _check(kernel, name, value, _is_range(value), "(first, last) with 1 <= first <= last, or last None")


def _configuration(kernel: str, config: dict[str, Any]) -> Any:
    """The dataclass with these fields, each of them checked."""
    fields = {field.name: field for field in dataclasses.fields(KERNELS[kernel].kind)}
    needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    _check_names(kernel, "config", config, needed, set(fields))
    made = KERNELS[kernel].kind(**config)
    least = 1 if kernel.startswith("layer_norm") else 16  # the least side of a tensor-core product
    for name in fields:
        value = getattr(made, name)
        if name == "warps":
            _check(kernel, name, value, type(value) is int and value in WARPS, f"one of {WARPS}")
        elif name == "stages":
            _check(kernel, name, value, type(value) is int and 1 <= value <= 8, "1 to 8")
        elif name == "registers":
            right = value is None or (type(value) is int and 16 <= value <= 255)
            _check(kernel, name, value, right, "None or 16 to 255")
        elif name == "programs":
            fewest = 1 if kernel in WALKING else 0
            _check(kernel, name, value, type(value) is int and fewest <= value <= 32, f"{fewest} to 32")
        elif isinstance(fields[name].default, bool):
            _check(kernel, name, value, type(value) is bool, "True or False")
        elif name == "chunks":
            right = value == () or (isinstance(value, tuple) and len(value) == 3 and _are_chunks(value))
            _check(kernel, name, value, right, "() or three powers of two from 16 on, absent ones 0 and last")
        elif not (config.get("chunks") and name in ("keys", "own") and value == 0):  # one pass has no use for them
            _check(kernel, name, value, _is_power(value, least), f"a power of two from {least} on")
    return made


def _check_cover(kernel: str, where: dict[str, Any], config: Any) -> None:
    """A tile that must hold everything at once holds the row's largest shape; and only the last chunk may be cut off, as
    the kernels look for a plain batch's end nowhere else."""
    chunks = getattr(config, "chunks", ())
    if chunks:
        first, last = where["length"]
        present = [n for n in chunks if n]
        right = last is not None and sum(present[:-1]) <= first and last <= sum(present)
        least = max(sum(present[:-1]), 1)
        _check(kernel, "length", (first, last), right, f"between {least} and {sum(present)} for chunks {chunks}")
    if kernel.startswith("layer_norm"):
        last = where["columns"][1]
        _check(kernel, "columns", where["columns"], last is not None and last <= config.width, f"to {config.width}")


def tile_row(entry: dict) -> TileRow:
    """A checked row; ValueError names what does not fit."""
    kernel = str(entry.get("kernel"))
    _check(kernel, "kernel", entry.get("kernel"), kernel in KERNELS, f"one of {tuple(KERNELS)}")
    names = {field.name for field in dataclasses.fields(TileRow)}
    _check_names(kernel, "row", entry, names, names)
    _check(kernel, "reason", entry["reason"], bool(entry["reason"]), "why, in words")
    _check_where(kernel, entry["where"])
    row = TileRow(kernel, entry["where"], _configuration(kernel, entry["config"]), entry["reason"])
    _check_cover(kernel, row.where, row.config)
    return row


def heaviest_length(first: int, last: int | None) -> int:
    """The length of a range whose last step in a loop is the largest: 120 tokens after whole steps of 128 (56 after 64,
    24 after 32). A range too short for that starts after a multiple of 16, and any of it but its end has that step."""
    end = first + 127 if last is None else last
    fullest = end - (end - 120) % 128
    return fullest if fullest >= first else first


@functools.cache
def _committed() -> tuple[TileRow, ...]:
    return tuple(tile_row(entry) for entry in ROWS)


_trials: list[tuple[TileRow, ...]] = []


def rows() -> tuple[TileRow, ...]:
    return _trials[-1] if _trials else _committed()


@contextmanager
def trying(*entries: dict) -> Iterator[None]:
    """Inside, the table is these rows and no others: a candidate goes the way on which its row would be taken."""

    before = rows()
    _trials.append(tuple(tile_row(entry) for entry in entries))
    changed = _trials[-1] != before

    def forget() -> None:
        for function in KERNELS.values() if changed else ():
            function.choose.cache_clear()

    forget()
    try:
        yield
    finally:
        _trials.pop()
        forget()
