"""The only place that picks a backend.

A backend is a set of primitive kernels (``plain.py`` or ``raw.py``) with a function that says why it cannot run. Each op
lists its backends in order of preference; ``choose`` takes the first that can run, or the one that was named.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .library import COMPOSITE, extension_status

# Triton with every product on one path, whatever the table of configurations says: for benchmarks and tests.
FORCED = ("triton_library", "triton_fused")
NAMES = ("auto", "cpu", "triton", "cuda", "torch", COMPOSITE, *FORCED)
WIDEST = 8192  # of a row that LayerNorm's GPU kernels keep on chip: kMaxWidth in csrc/cuda/team_index.h
TABLE: dict[str, Sequence[Backend]] = {}  # op -> its backends, filled by each op's module


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: what the caller writes as ``backend=``.
        run: returns the primitive kernels; imports what it needs only when called.
        why_not: ``why_not(device, dtypes, named)`` returns the reason it cannot run there, or None; ``device=None`` asks
            about the machine alone. ``named`` is false for ``backend="auto"``.
    """

    name: str
    run: Callable[[], Any]
    why_not: Callable[[str | None, Sequence[torch.dtype], bool], str | None]


def check_backend_name(backend: str) -> None:
    """Raise ValueError unless ``backend`` is a known name."""
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, NAMES))}")


def choose(
    op: str,
    x: torch.Tensor,
    wanted: str,
    *more: torch.dtype,
    why_not: Callable[[str], str | None] = lambda name: None,
) -> Any:
    """Return the kernels of the backend that runs ``op`` on ``x`` (and on tensors of ``more`` dtypes).

    ``why_not(name)`` says why a backend that could run otherwise cannot run this very call (its shape, say), or None; it is
    asked only about backends that can run here.

    Raises:
        ValueError: ``wanted`` is no backend's name.
        RuntimeError: the named backend (or, for "auto", every one) cannot run; lists each backend's reason.
    """
    device, dtypes = x.device.type, (x.dtype, *more)
    if wanted in FORCED and all(wanted != b.name for b in TABLE[op]):
        wanted = "triton"  # an op without products has one path

    def reason(backend: Backend, named: bool) -> str | None:
        return backend.why_not(device, dtypes, named) or why_not(backend.name)

    for backend in TABLE[op]:
        if wanted in ("auto", backend.name) and reason(backend, wanted != "auto") is None:
            return backend.run()
    check_backend_name(wanted)
    reasons = "; ".join(f"{b.name}: {reason(b, True) or 'can run'}" for b in TABLE[op])
    raise RuntimeError(f"{op}: backend {wanted!r} cannot run on {device} tensors of {x.dtype}. {reasons}")


def too_wide(x: torch.Tensor) -> Callable[[str], str | None]:
    """``why_not`` for ``choose`` in ops that normalise or add whole rows of x [..., D]."""

    def why_not(name: str) -> str | None:
        if name in ("cuda", "triton", *FORCED) and x.shape[-1] > WIDEST:
            return f"rows of {x.shape[-1]}: its LayerNorm kernels keep a row on chip, at most {WIDEST} wide"
        return None

    return why_not


def backends() -> list[dict[str, Any]]:
    """Every op with every backend on this machine: ``{"op", "backend", "available", "reason"}``, reason None if available."""
    rows = []
    for op, table in sorted(TABLE.items()):
        for backend in table:
            reason = backend.why_not(None, (), True)
            rows.append({"op": op, "backend": backend.name, "available": reason is None, "reason": reason})
    return rows


def standard_backends(*names: str) -> tuple[Backend, ...]:
    """The table rows of the named backends, with the reasons that hold for every op, and of the one that every op has."""
    return tuple(_STANDARD[name] for name in (*names, COMPOSITE))


def _torch_kernels() -> Any:
    from .plain import KERNELS

    return KERNELS


def _composite_kernels() -> Any:
    from .composite import KERNELS

    return KERNELS


@functools.cache
def _raw_kernels(kind: str) -> Any:
    from .raw import RawKernels
    from .raw_cpu import CpuKernels
    from .raw_triton import TritonKernels

    if kind in FORCED:
        return TritonKernels(kind.removeprefix("triton_"))
    return {"cpu": CpuKernels, "cuda": RawKernels, "triton": TritonKernels}[kind]()


def _never(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    return None


def _why_not_composite(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    return None if named or device is None else "keeps more for backward than the ops do: it runs only when named"


def _why_not_cpu(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    status = extension_status()["_C"]
    if not status["loaded"]:
        return f"the C++ extension did not load: {status['error']}"
    if device is None:
        return None
    if device != "cpu":
        return "needs CPU tensors"
    return _why_not_dtype(dtypes, (torch.float32, torch.bfloat16))


def _why_not_cuda(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    status = extension_status()["_C_cuda"]
    if not status["loaded"]:
        return f"the CUDA extension did not load: {status['error']}"
    if device is None:
        return None if torch.cuda.is_available() else "no CUDA GPU"
    if device != "cuda":
        return "needs CUDA tensors"
    return _why_not_dtype(dtypes, (torch.float32, torch.bfloat16, torch.float16))


def _why_not_triton(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels run on the CPU, slowly
    if device is None:
        return (
            None if interpreted or torch.cuda.is_available() else "no CUDA GPU (TRITON_INTERPRET=1 runs it on the CPU)"
        )
    if device == "cuda":
        return _why_not_dtype(dtypes, (torch.float32, torch.bfloat16, torch.float16))
    if device != "cpu" or not interpreted:
        return "needs CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors)"
    if not named:
        return "the interpreter is for tests: it runs only when named"
    return _why_not_dtype(dtypes, (torch.float32, torch.float16))  # the interpreter has no bf16 products


def _why_not_forced(device: str | None, dtypes: Sequence[torch.dtype], named: bool) -> str | None:
    if device is not None and not named:
        return "forces one path of Triton's products: it runs only when named"
    return _why_not_triton(device, dtypes, named)


def _why_not_dtype(dtypes: Sequence[torch.dtype], allowed: Sequence[torch.dtype]) -> str | None:
    refused = [d for d in dtypes if d not in allowed]
    return f"dtype {refused[0]} is not among {', '.join(map(str, allowed))}" if refused else None


_STANDARD = {
    "cpu": Backend("cpu", functools.partial(_raw_kernels, "cpu"), _why_not_cpu),
    "triton": Backend("triton", functools.partial(_raw_kernels, "triton"), _why_not_triton),
    "cuda": Backend("cuda", functools.partial(_raw_kernels, "cuda"), _why_not_cuda),
    "torch": Backend("torch", _torch_kernels, _never),
    COMPOSITE: Backend(COMPOSITE, _composite_kernels, _why_not_composite),
    **{name: Backend(name, functools.partial(_raw_kernels, name), _why_not_forced) for name in FORCED},
}
