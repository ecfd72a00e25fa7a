"""What tests of the benchmarks share: a known machine, rows and files of it, and a case that doubles its input."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from vitfast.benchmarks import schema
from vitfast.benchmarks.harness import Case, Provider, Work
from vitfast.benchmarks.schema import Row

MACHINE = {
    "kind": "cpu",
    "name": "Test CPU",
    "threads": 1,
    "cache_mib": 1.0,
    "cold_mib": 2.0,
    "copy_gb_per_s": 10.0,
    "matrix_tflops": {"float32": 0.1, "bfloat16": 0.2},
    "launch_us": 1.0,
    "dispatch_us": 1.0,
    "clocks": {},
    "driver": None,
    "load": 0.0,
}


def content(*rows: Row) -> dict[str, Any]:
    return {
        "schema": schema.SCHEMA,
        "machine": MACHINE,
        "versions": {"torch": "2"},
        "commit": None,
        "dirty": None,
        "date": "2026-01-01T00:00:00+00:00",
        "command": "vitfast bench",
        "preset": "standard",
        "rows": [dataclasses.asdict(row) for row in rows],
        "absent": [{"provider": "Other", "reason": "not installed", "install": "pip install other"}],
    }


def row(provider: str = "vitfast cpu", ms: float = 1.0, shape: str = "B=1 L=4", **values: Any) -> Row:
    made = Row(
        "attention", shape, "float32", "forward", provider, provider.startswith("vitfast"), ms, ms * 0.9, ms * 1.1
    )
    made = dataclasses.replace(made, samples=5, bytes=1000, flops=2000, floor_ms=0.5, floor_share=0.5 / ms)
    return dataclasses.replace(made, **values)


def doubling(providers: list[Provider], **changes: Any) -> Case:
    """x -> 2 x, with x's gradient."""
    case = Case(
        op="double",
        shape={"B": 3, "D": 4},
        dtype="float32",
        device="cpu",
        inputs=lambda: {"x": torch.arange(12.0).view(3, 4) + 1},
        grads=("x",),
        reference=lambda x: 2 * x,
        providers=lambda: providers,
        work={d: [Work(96, 12)] for d in ("forward", "backward", "both")},
        batched=("x",),
    )
    return dataclasses.replace(case, **changes)
