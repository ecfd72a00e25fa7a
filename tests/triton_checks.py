"""What tests of the raw Triton kernels share: their device and dtypes, tensors, and the bound on an error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_checks import DEVICE
from torch import Tensor

# The interpreter truncates to bf16 instead of rounding, and its bf16 products are wrong: there only fp32 and fp16 are
# tested.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def rand(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * spread).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


def check(name: str, got: Tensor, plain: Tensor, truth: Tensor, floor: float = 4e-6) -> None:
    """The kernel's error against fp64 is at most twice plain PyTorch's in the same dtype, with a floor of a few ulp of
    fp32."""
    assert torch.isfinite(got).all(), name
    floor = floor * max(float(truth.abs().max()), 1e-3) if truth.numel() else 0.0
    if truth.numel():
        error, allowed = float((got.double() - truth).abs().max()), float((plain.double() - truth).abs().max())
        assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, plain PyTorch's {allowed:.3g}"


def both(
    function: Callable[..., dict[str, Tensor]], *tensors: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference in the tensors' own dtypes and in fp64."""
    return function(*tensors), function(*(None if t is None else t.double() for t in tensors))
