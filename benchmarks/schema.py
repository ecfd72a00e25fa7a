"""The result file: what it says, how it is checked, how it is written.

One JSON object: ``schema`` (this layout's number), ``machine``, ``versions``, ``commit``, ``dirty``, ``date``, ``command``,
``preset``, ``rows`` and ``absent``. ``FIELDS`` describes a row; docs/performance.md prints the same table.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

SCHEMA = 2
DTYPES = ("float32", "bfloat16", "float16", "autocast")
DIRECTIONS = ("forward", "backward", "both")
PRESETS = ("overview", "standard", "growth", "threads", "smoke", "dry")


@dataclasses.dataclass
class Row:
    """One provider's time for one case and direction; see FIELDS for each entry."""

    op: str
    shape: str
    dtype: str
    direction: str
    provider: str
    ours: bool
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    samples: int = 0
    bytes: int = 0
    flops: int = 0
    floor_ms: float = 0.0
    floor_share: float | None = None
    peak_mib: float | None = None
    kept_mib: float | None = None
    best_peer: str | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    error: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.op, self.shape, self.dtype, self.direction, self.provider

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.key[:4]


# name -> (types, may be null, meaning)
FIELDS: dict[str, tuple[tuple[type, ...], bool, str]] = {
    "op": ((str,), False, "what was timed: an op, `model`, `train`, `memory` or `overhead`"),
    "shape": ((str,), False, "the case's axes, as `B=8 L=197 H=12 E=64`"),
    "dtype": ((str,), False, "of weights and inputs; `autocast`: fp32 weights under bf16 autocast"),
    "direction": ((str,), False, "`forward` (no graph kept), `backward` (the graph's backward alone), `both`"),
    "provider": ((str,), False, 'who computed it; `vitfast` is `backend="auto"`, `vitfast cpu` a named backend'),
    "ours": ((bool,), False, "whether the provider is vitfast"),
    "ms": ((int, float), True, "median milliseconds of a call; null: no number, see `note`"),
    "ms_low": ((int, float), True, "20 % quantile of the samples"),
    "ms_high": ((int, float), True, "80 % quantile"),
    "samples": ((int,), False, "how many samples (rounds) the quantiles come from"),
    "bytes": ((int,), False, "that must move between memory and chip at least: inputs read, results written"),
    "flops": ((int,), False, "that the definition needs (a multiply-add is two)"),
    "floor_ms": (
        (int, float),
        False,
        "max(bytes / copy bandwidth, flops / matrix rate, one launch), summed over parts",
    ),
    "floor_share": ((int, float), True, "floor_ms / ms; 1 is the limit of the machine as measured"),
    "peak_mib": ((int, float), True, "most memory above the start of the call, MiB"),
    "kept_mib": ((int, float), True, "memory kept from forward to backward, MiB, parameters and inputs not counted"),
    "best_peer": ((str,), True, "the fastest provider of the same case that is not vitfast"),
    "ratio": ((int, float), True, "best peer's ms / this ms; over 1 is faster than every peer"),
    "ratio_low": ((int, float), True, "20 % quantile of the ratio, round by round"),
    "ratio_high": ((int, float), True, "80 % quantile of it"),
    "error": ((int, float), True, "worst error against fp64 over the error allowed, from the gate; at most 1"),
    "note": ((str,), False, "why there is no number, or what ran"),
}

_TOP: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "machine": (dict,),
    "versions": (dict,),
    "commit": (str, type(None)),
    "dirty": (bool, type(None)),
    "date": (str,),
    "command": (str,),
    "preset": (str,),
    "rows": (list,),
    "absent": (list,),
}
_MACHINE: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "threads": (int,),
    "cache_mib": (int, float),
    "copy_gb_per_s": (int, float),
    "matrix_tflops": (dict,),
    "launch_us": (int, float),
    "dispatch_us": (int, float),
    "clocks": (dict,),
    "driver": (str, type(None)),
    "load": (int, float, type(None)),
}
# Not in the first files of this layout: whose inputs took twice the cache, and whose rates are of products alone.
_MACHINE_LATER: dict[str, tuple[type, ...]] = {"cold_mib": (int, float), "product_tflops": (dict,)}
_ABSENT = ("provider", "reason", "install")


def _typed(where: str, value: Any, types: tuple[type, ...]) -> None:
    if isinstance(value, bool) and bool not in types:
        raise ValueError(f"{where} is {value!r}; expected {' or '.join(t.__name__ for t in types)}")
    if not isinstance(value, types):
        raise ValueError(f"{where} is {value!r}; expected {' or '.join(t.__name__ for t in types)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; numbers must be finite")


def _keys(where: str, value: dict[str, Any], wanted: Any) -> None:
    missing, unknown = set(wanted) - set(value), set(value) - set(wanted)
    if missing or unknown:
        raise ValueError(f"{where}: missing {sorted(missing) or 'nothing'}, unknown {sorted(unknown) or 'nothing'}")


def validate(content: Any) -> None:
    """Raise ValueError naming the place where ``content`` is not a result file of this schema."""
    if not isinstance(content, dict):
        raise ValueError(f"a result file is one JSON object, got {type(content).__name__}")
    _keys("result", content, _TOP)
    for name, types in _TOP.items():
        _typed(name, content[name], types)
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema is {content['schema']}; this vitfast reads {SCHEMA}")
    if content["preset"] not in PRESETS:
        raise ValueError(f"preset is {content['preset']!r}; allowed: {', '.join(PRESETS)}")
    machine = {name: value for name, value in content["machine"].items() if name not in _MACHINE_LATER}
    _keys("machine", machine, _MACHINE)
    for name, types in (_MACHINE | _MACHINE_LATER).items():
        if name in content["machine"]:
            _typed(f"machine.{name}", content["machine"][name], types)
    for i, entry in enumerate(content["absent"]):
        _typed(f"absent[{i}]", entry, (dict,))
        _keys(f"absent[{i}]", entry, _ABSENT)
    seen = set()
    for i, row in enumerate(content["rows"]):
        _typed(f"rows[{i}]", row, (dict,))
        _keys(f"rows[{i}]", row, FIELDS)
        for name, (types, nullable, _) in FIELDS.items():
            _typed(f"rows[{i}].{name}", row[name], (*types, type(None)) if nullable else types)
        _check_row(f"rows[{i}]", row)
        key = Row(**row).key
        if key in seen:
            raise ValueError(f"rows[{i}]: {' '.join(key)} is there twice")
        seen.add(key)


def _check_row(where: str, row: dict[str, Any]) -> None:
    for name, allowed in (("dtype", DTYPES), ("direction", DIRECTIONS)):
        if row[name] not in allowed:
            raise ValueError(f"{where}.{name} is {row[name]!r}; allowed: {', '.join(allowed)}")
    timed = [row[name] is not None for name in ("ms", "ms_low", "ms_high")]
    if any(timed) != all(timed):
        raise ValueError(f"{where}: ms, ms_low and ms_high are all given or all null")
    if all(timed):
        if not 0 < row["ms_low"] <= row["ms"] <= row["ms_high"]:
            raise ValueError(f"{where}: 0 < ms_low <= ms <= ms_high does not hold")
    elif not row["note"] and row["kept_mib"] is None:
        raise ValueError(f"{where}: no number and no note that says why")
    if row["ratio"] is not None and row["best_peer"] is None:
        raise ValueError(f"{where}: a ratio needs a best_peer")


def rows_of(content: dict[str, Any]) -> list[Row]:
    return [Row(**row) for row in content["rows"]]


def read(path: str | Path) -> dict[str, Any]:
    """The checked content of a result file. Raises ValueError with the file's name, FileNotFoundError."""
    try:
        content = json.loads(Path(path).read_text())
        validate(content)
    except ValueError as error:  # JSON's own error is one too
        raise ValueError(f"{path}: {error}") from None
    return content


def write(path: str | Path, content: dict[str, Any]) -> None:
    """Check, then write, a row a line: the file is whole or as it was."""
    validate(content)
    text = json.dumps(content | {"rows": []}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in content["rows"])
    write_text(path, (text.replace('\n "rows": []', f'\n "rows": [\n{rows}\n ]', 1) if rows else text) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write by renaming a finished temporary file, so that nobody sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(FIELDS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return text.getvalue()
