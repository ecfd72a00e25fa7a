"""How far an op may be from the truth. The truth is the reference in fp64.

An op's error is held against plain PyTorch's own error in the same dtype: at most twice it, for the output and for every
gradient. Where plain PyTorch happens to be exact (or nearly), the floor below applies: a few roundings of the dtype, as a
share of the truth's norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 3e-7,  # about five roundings of 2^-24
    torch.float16: 5e-4,  # one rounding of 2^-11
    torch.bfloat16: 4e-3,  # one rounding of 2^-8
}


def relative_error(x: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth (1 where the truth is zero)."""
    if truth.numel() == 0:
        assert x.shape == truth.shape
        return 0.0
    difference = (x.detach().double() - truth.detach().double()).norm()
    norm = truth.detach().double().norm()
    return float(difference / norm) if norm > 0 else float(difference)


def assert_close_to_truth(name: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Assert shape, finiteness where the truth is finite, and the bound on the error."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert bool(torch.isfinite(ours).all()) == bool(torch.isfinite(truth).all()), f"{name}: not finite"
    error, allowed = relative_error(ours, truth), FACTOR * relative_error(plain, truth) + FLOOR[dtype]
    assert error <= allowed, f"{name}: error {error:.3g} against fp64, allowed {allowed:.3g}"
