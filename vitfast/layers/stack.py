"""Plain blocks one after the other in one call of C++, for inference on CPUs: calling the blocks of a ViT-Ti one by one takes
Python as long as their arithmetic takes the CPU at batch 1.

What a call needs is collected once (``_Plan``) and asked at every call whether it is still true: the same modules with the
same classes and parameters, no hooks, weights unchanged since they were packed. B images, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.layers.attention import Attention
from vitfast.layers.block import Block
from vitfast.layers.mlp import Mlp
from vitfast.layers.tokens import Tokens
from vitfast.layers.untouched import untouched, watched
from vitfast.ops import runs_unwatched, weight_cache
from vitfast.ops.arguments import POINTWISE, autocast_dtype
from vitfast.ops.dispatch import choose
from vitfast.ops.raw_cpu import CpuKernels


class BlockStack:
    """Runs the blocks of a model in one call where that is possible; holds what it found out about them until it changes."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def run(
        self, blocks: list[nn.Module], x_BLD: Tensor, tokens: Tokens, backend: str, first_token: bool
    ) -> Tensor | None:
        """What ``blocks`` make of x, or None where they have to be called one by one.

        first_token: [B, 1, D], the first token alone.
        """
        if torch.is_grad_enabled() or not blocks or not tokens.plain or not runs_unwatched(x_BLD):
            return None
        if x_BLD.device.type != "cpu" or autocast_dtype(x_BLD) is not None:
            return None
        if self._plan is None or not self._plan.fits(blocks):
            self._plan = _Plan.of(blocks, x_BLD, backend)
        return None if self._plan is None else self._plan.run(x_BLD, first_token)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStack:
        return BlockStack()

    def __reduce__(self) -> tuple[type[BlockStack], tuple[()]]:
        return BlockStack, ()


class _Plan:
    def __init__(self, blocks: list[Any], kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.blocks = blocks
        self.modules = [(module, type(module)) for block in blocks for module in block.modules()]
        tables = [table for module, _ in self.modules for table in (module._modules, module._parameters)]
        self.entries = [(table, name, value) for table in tables for name, value in table.items()]
        self.generation = weight_cache.generation()
        self.panels: list[tuple[Tensor, weight_cache.Kept]] = []
        self.dtypes = [(p, p.dtype) for block in blocks for p in block.parameters()]
        nothing = torch.empty(0)
        parameters = [part for block in blocks for part in self._parameters(block)]
        self.parameters = [nothing if part is None else part.detach() for part in parameters]
        self.addresses = [p.data_ptr() for p, _ in self.dtypes]
        first = blocks[0]
        self.attributes = first.attn.num_heads, first.attn.head_dim**-0.5, first.norm1.eps, first.mlp.activation

    @classmethod
    def of(cls, blocks: list[nn.Module], x_BLD: Tensor, backend: str) -> _Plan | None:
        """A plan for these blocks, or None where they are not all plain and alike or no backend has the call."""
        if not all(type(block) is Block and not watched(block) and _plain(block) for block in blocks):
            return None
        if len({_attributes(block) for block in blocks}) != 1:
            return None
        dtype = next(blocks[0].attn.parameters()).dtype  # type: ignore[union-attr, operator]
        kernels = choose("norm_attention", x_BLD, backend, dtype)
        return cls(blocks, kernels) if isinstance(kernels, CpuKernels) and dtype in kernels.own_dtypes else None

    def _parameters(self, block: Any) -> Iterable[Tensor | None]:
        attn, mlp, (scale1, scale2) = block.attn, block.mlp, block.scales()
        yield from (block.norm1.weight, block.norm1.bias)
        yield from (attn.qkv.weight, self._packed(attn.qkv.weight), attn.qkv.bias)
        yield from (attn.proj.weight, self._packed(attn.proj.weight), attn.proj.bias, scale1)
        yield from (block.norm2.weight, block.norm2.bias)
        yield from (mlp.fc1.weight, self._packed(mlp.fc1.weight), mlp.fc1.bias)
        yield from (mlp.fc2.weight, self._packed(mlp.fc2.weight), mlp.fc2.bias, scale2)

    def _packed(self, weight: Tensor) -> Tensor | None:
        panels = self.kernels.panels(weight)
        if panels is None:
            return None
        self.panels.append((weight, panels))
        return panels.value

    def fits(self, blocks: list[nn.Module]) -> bool:
        """Whether nothing has changed that the plan was made from."""
        return (
            len(blocks) == len(self.blocks)
            and all(ours is theirs for ours, theirs in zip(self.blocks, blocks, strict=True))
            and all(table.get(name) is value for table, name, value in self.entries)
            and not any(type(module) is not kind or watched(module) for module, kind in self.modules)
            and [p.data_ptr() for p, _ in self.dtypes] == self.addresses
            and all(p.dtype is dtype for p, dtype in self.dtypes)
            and not any(block.training or block.precision != "float" for block in self.blocks)
            and self.generation == weight_cache.generation()
            and all(panels.fits(weight) for weight, panels in self.panels)
        )

    def run(self, x_BLD: Tensor, first_token: bool) -> Tensor:
        return self.kernels.blocks(x_BLD.contiguous(), self.parameters, *self.attributes, first_token)


def _attributes(block: Any) -> tuple[Any, ...]:
    attn = block.attn
    dtypes = {p.dtype for p in (attn.qkv.weight, attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight)}
    return attn.num_heads, attn.head_dim, block.norm1.eps, block.norm2.eps, block.mlp.activation, *dtypes


def _plain(block: Any) -> bool:
    """Nothing in it but what the call computes, and parameters it can read where they are."""
    if type(block.attn) is not Attention or type(block.mlp) is not Mlp or not untouched(block):
        return False
    if block.training or block.precision != "float" or block.norm1.eps != block.norm2.eps:
        return False
    between = (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
    weights = [p for p in block.parameters() if p.dim() == 2]
    return (
        all(isinstance(part, nn.Identity) for part in between)
        and block.mlp.activation in POINTWISE
        and all(p.is_contiguous() for p in block.parameters())
        and all(p.dtype == weights[0].dtype for p in weights)
    )
