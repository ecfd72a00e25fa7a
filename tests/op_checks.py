"""What every op's test does: parity with the fp64 truth, opcheck, gradcheck, compile, on every backend that can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tolerances import assert_close_to_truth
from torch import Tensor

from vitfast.ops.dispatch import TABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "cpu", "triton", "cuda", "composite")
PRODUCT_BACKENDS = (*BACKENDS, "triton_fused")  # Triton's own products too, which the table may not choose
# Tokens of ViTs at common sizes and their neighbours, and the neighbours of tiles of 16, 64 and 128.
LENGTHS = (
    1,
    2,
    15,
    16,
    17,
    49,
    50,
    63,
    64,
    65,
    127,
    128,
    129,
    191,
    192,
    193,
    196,
    197,
    201,
    255,
    256,
    257,
    320,
    321,
    577,
)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers in fp64, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * scale


def without_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under no_grad, for the ops that have no backward."""

    def inner(*args: Any, **tensors: Any) -> Any:
        with torch.no_grad():
            return run(*args, **tensors)

    return inner


@dataclass
class Case:
    """One call of an op.

    Attributes:
        op: called with the tensors and ``backend=``; returns a tensor or a tuple of them.
        ref: the same in plain PyTorch, without ``backend``.
        tensors: fp64 inputs by name (None allowed); each gets a gradient unless named in ``constants``.
        constants: names of inputs that keep their dtype and get no gradient.
        wide: names of inputs that stay fp32 where the dtype is narrower, as the residual stream under autocast.
    """

    op: Callable[..., Any]
    ref: Callable[..., Any]
    tensors: dict[str, Tensor | None]
    constants: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    seed: int = field(default=0)

    def inputs(self, dtype: torch.dtype, device: str, grad: bool = True) -> dict[str, Tensor | None]:
        made: dict[str, Tensor | None] = {}
        for name, tensor in self.tensors.items():
            if tensor is None or name in self.constants:
                made[name] = None if tensor is None else tensor.to(device)
            else:
                kind = torch.float32 if name in self.wide and dtype != torch.float64 else dtype
                # clone keeps strides, so that permuted inputs stay permuted
                made[name] = tensor.detach().clone().to(device, kind).requires_grad_(grad)
        return made


def skip_unless_available(op: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip with the backend's own reason, or because the op has no such backend."""
    row = next((b for b in TABLE[op] if b.name == backend), None)
    if row is None:
        pytest.skip(f"{op} has no backend {backend}")
    device = "cpu" if backend == "cpu" else DEVICE
    reason = row.why_not(None, (), True) or row.why_not(device, (dtype,), True)
    if reason:
        pytest.skip(f"{backend}: {reason}")


def _results(run: Callable[..., Any], inputs: dict[str, Tensor | None], seed: int) -> dict[str, Tensor]:
    out = run(**inputs)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for o in outs:
        # gradients of the size that the result's own rounding can carry
        weights = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)
        loss = loss + (o.double() * weights).sum()
    if loss.requires_grad:
        loss.backward()
    named = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    grads = {f"gradient of {n}": t.grad for n, t in inputs.items() if t is not None and t.grad is not None}
    return named | grads


def check_parity(case: Case, op: str, backend: str, dtype: torch.dtype) -> None:
    """Error of the output and of every gradient against fp64: at most twice plain PyTorch's own."""
    skip_unless_available(op, backend, dtype)
    device = "cpu" if backend == "cpu" else DEVICE
    truth_inputs = case.inputs(dtype, device)
    for name, tensor in truth_inputs.items():  # the truth is computed from the rounded inputs
        if tensor is not None and name not in case.constants:
            truth_inputs[name] = tensor.detach().double().requires_grad_()
    truth = _results(case.ref, truth_inputs, case.seed)
    plain = _results(case.ref, case.inputs(dtype, device), case.seed)
    ours = _results(lambda **t: case.op(**t, backend=backend), case.inputs(dtype, device), case.seed)
    assert ours.keys() == truth.keys()
    for name in truth:
        assert_close_to_truth(f"{op} {backend} {dtype} {name}", ours[name], plain[name], truth[name], dtype)


def check_gradients(case: Case) -> None:
    """The written-out backward against finite differences in fp64."""
    inputs = case.inputs(torch.float64, "cpu")
    names = [n for n, t in inputs.items() if t is not None and t.requires_grad]
    rest = {n: t for n, t in inputs.items() if n not in names}

    def run(*tensors: Tensor) -> Any:
        return case.op(**dict(zip(names, tensors, strict=True)), **rest, backend="torch")

    assert torch.autograd.gradcheck(run, tuple(inputs[n] for n in names))


def check_compiles(case: Case, op: str, backend: str) -> None:
    """One graph, the same result and gradients as eager, with a second batch size."""
    skip_unless_available(op, backend)
    device = "cpu" if backend == "cpu" else DEVICE

    def run(**tensors: Any) -> Any:
        return case.op(**tensors, backend=backend)

    torch.compiler.reset()  # every case compiles the same function: without this they share its recompile limit
    eager = _results(run, case.inputs(torch.float32, device), case.seed)
    compiled = _results(torch.compile(run, fullgraph=True), case.inputs(torch.float32, device), case.seed)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name])


def check_repeatable(case: Case, op: str, backend: str) -> None:
    """The same bits twice, outputs and gradients."""
    skip_unless_available(op, backend)
    device = "cpu" if backend == "cpu" else DEVICE
    first, second = (
        _results(lambda **t: case.op(**t, backend=backend), case.inputs(torch.float32, device), case.seed)
        for _ in range(2)
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name
