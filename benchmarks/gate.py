"""No number without a right result: every provider is first held against fp64, on the shape that is to be timed.

The bound is the tests' (tests/tolerances.py; a test compares the two): at most twice plain PyTorch's own error in the same
dtype, for the result and for every gradient, or a few roundings of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {torch.float64: 1e-12, torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}

Run = Callable[..., Any]
Inputs = dict[str, Tensor | None]


def tensors_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


@dataclass
class Gate:
    """The truth of one case and how far plain PyTorch is from it.

    Attributes:
        truth: result and gradients by name in fp64.
        plain: plain PyTorch's relative error of each.
        samples: how many samples of the batch the truth covers, None for all; the rest is not compared.
        floor: the error allowed where plain PyTorch is exact.
    """

    truth: dict[str, Tensor]
    plain: dict[str, float]
    samples: int | None
    floor: float

    @classmethod
    def of(
        cls,
        reference: Run,
        inputs: Inputs,
        grads: Sequence[str],
        batched: Sequence[str],
        samples: int | None,
        floor: float,
        truth_of: Run | None = None,
    ) -> Gate:
        """Run the reference in fp64 on the rounded inputs, and in their own dtype.

        ``samples`` cuts the ``batched`` inputs, and needs every gradient to be of one of them.
        """
        if samples is not None and not set(grads) <= set(batched):
            raise ValueError(f"gradients of {sorted(set(grads) - set(batched))} need the whole batch")

        def cut(name: str, tensor: Tensor) -> Tensor:
            return tensor[:samples] if samples is not None and name in batched else tensor

        low = {n: None if t is None else cut(n, t).detach() for n, t in inputs.items()}
        exact = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in low.items()}
        truth = outcome(truth_of or reference, exact, grads)
        plain = outcome(reference, low, grads)
        errors = {name: relative_error(plain[name], truth[name]) for name in truth}
        return cls(truth, errors, samples, floor)

    def check(self, run: Run, inputs: Inputs, grads: Sequence[str], batched: Sequence[str]) -> tuple[float, str]:
        """(worst error over the error allowed, "" or why the result does not pass)."""
        found = outcome(run, inputs, grads, self.truth, self.samples, batched)
        worst, where = 0.0, ""
        for name, truth in self.truth.items():
            if found[name].shape != truth.shape:
                return math.inf, f"{name} has shape {tuple(found[name].shape)}, expected {tuple(truth.shape)}"
            error, allowed = relative_error(found[name], truth), FACTOR * self.plain[name] + self.floor
            if not math.isfinite(error):
                return math.inf, f"{name} is not finite"
            worst = max(worst, error / allowed)
            if error > allowed and not where:  # the first: results come before gradients
                where = f"{name} is {error:.2g} from fp64, allowed {allowed:.2g}"
        return worst, where


def outcome(
    run: Run,
    inputs: Inputs,
    grads: Sequence[str],
    like: Mapping[str, Tensor] | None = None,
    samples: int | None = None,
    batched: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Results and gradients by name. ``like`` and ``samples`` say what to keep of a run on the whole batch."""
    leaves = {n: t.detach().requires_grad_(n in grads) if t is not None else None for n, t in inputs.items()}
    with torch.set_grad_enabled(bool(grads)):
        results = tensors_of(run(**leaves))
    named = {f"result {i}" if i else "result": r for i, r in enumerate(results)}
    gradients: dict[str, Tensor] = {}
    if grads:
        cotangents = [cotangent(r.shape, r.device, samples if like is not None else None).to(r.dtype) for r in results]
        wanted = [leaves[n] for n in grads]
        found = torch.autograd.grad(results, wanted, cotangents)  # type: ignore[arg-type]
        gradients = {f"gradient of {n}": g for n, g in zip(grads, found, strict=True)}
    if samples is not None and like is not None:
        named = {n: r[:samples] for n, r in named.items()}
        gradients = {n: g[:samples] if n.removeprefix("gradient of ") in batched else g for n, g in gradients.items()}
    return {n: t.detach() for n, t in (named | gradients).items()}


def cotangent(shape: Sequence[int], device: torch.device, samples: int | None = None) -> Tensor:
    """What stands for the loss's gradient, fp32; its first ``samples`` are those of the batch cut to them."""
    generator = torch.Generator().manual_seed(7)
    if samples is None or samples >= shape[0]:
        return torch.randn(tuple(shape), generator=generator).to(device)
    first = torch.randn((samples, *shape[1:]), generator=generator).to(device)
    return torch.cat([first, first[:1].expand(shape[0] - samples, *shape[1:])])


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth (1 where the truth is zero)."""
    norm = float(truth.double().norm())
    difference = float((x.double() - truth.double()).norm())
    return difference / norm if norm > 0 else difference
