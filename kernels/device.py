"""What the launchers ask about the chip: its architecture, its size, and how fp32 products are to be rounded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    arch: int  # 80, 90, 100, ...: ten times the compute capability
    multiprocessors: int
    shared_bytes: int  # the most one block may use


# The interpreter runs on CPU tensors. Few multiprocessors make its two-stage reductions take several parts and stay
# quick.
INTERPRETER = Device(arch=90, multiprocessors=1, shared_bytes=232448)


@functools.cache
def device_properties(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Device(
        arch=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def launcher(function: Callable[..., None]) -> Callable[..., None]:
    """Launch on the device of the first argument: Triton launches on the current one."""

    @functools.wraps(function)
    def launch(first: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                function(first, *args, **kwargs)
        else:
            function(first, *args, **kwargs)

    return launch


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot rounds fp32 operands, by PyTorch's own switch; 16-bit operands have one way only."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
