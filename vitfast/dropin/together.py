"""A model's fast blocks in one call at inference on CPUs, and the first token alone where its head reads no other."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.dropin.fast import Fast, FastBlock, both_halves, run_together
from vitfast.dropin.parts import may_run
from vitfast.layers.halves import Halves
from vitfast.layers.untouched import watched

_calls = threading.local()  # .sequence: of which the model that runs reads the first token alone


class Sequential(Fast, nn.Sequential):
    """Fast blocks one after the other: in one call where that is possible, otherwise as before."""

    def forward(self, input: Tensor) -> Tensor:
        if may_run(input) and holds_blocks(self):
            blocks: list[Any] = list(self)

            def describe() -> list[Halves | None]:
                return [both_halves(block, block.parts(block, "now"), input) for block in blocks]

            first_token = getattr(_calls, "sequence", None) is self
            out = run_together(self, blocks, input, describe, first_token=first_token)
            if out is not None:
                return out
        return super().forward(input)


class FirstTokenModel(Fast):
    """A model that cuts the first token out of what its sequence of blocks and the norm behind it return.

    The last block then makes this token alone, [B, 1, D] instead of [B, L, D]. An adapter mixes this in before the
    original class and says where the two are.
    """

    def sequence_and_norm(self) -> tuple[nn.Module, nn.Module] | None:
        """The sequence and the norm, None where more than the first token is read or somebody looks at what is between."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = None if torch.compiler.is_compiling() else self.sequence_and_norm()
        if found is None or any(map(watched, found)) or not _is_of_each_token(found[1]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before = getattr(_calls, "sequence", None)
        _calls.sequence = found[0]
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _calls.sequence = before


def holds_blocks(module: nn.Sequential) -> bool:
    """Whether ``module`` is made of fast blocks alone."""
    return len(module) > 0 and all(isinstance(block, FastBlock) for block in module)


def _is_of_each_token(norm: nn.Module) -> bool:
    return isinstance(norm, Fast) or type(norm) in (nn.LayerNorm, nn.Identity)
