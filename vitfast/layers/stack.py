"""Plain blocks one after the other in one call of C++, on CPUs and where no gradient is wanted: calling the blocks of a ViT-Ti
one by one takes Python as long as their arithmetic takes the CPU at batch 1.

What a call needs is collected once (``_Plan``) and asked at every call whether it is still true: the same modules with the
same classes, attributes and parameters, no hooks, weights unchanged since they were packed. B images, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitfast.layers.halves import AttentionHalf, Halves, Linear, MlpHalf
from vitfast.layers.untouched import hooks_of, watched
from vitfast.ops import Rope, is_unwatched, weight_cache
from vitfast.ops.arguments import ACTIVATIONS, autocast_dtype, product_dtype
from vitfast.ops.dispatch import choose
from vitfast.ops.raw_cpu import CpuKernels

Describe = Callable[[], Sequence[Halves | None]]  # what each block computes with, None where its own code has to run

_NOTHING = torch.empty(0, device="cpu")  # in the place of a parameter that is not there


class BlockStack:
    """Runs blocks in one call where that is possible; holds what it found out about them until it changes."""

    def __init__(self) -> None:
        self._plan: _Plan | None = None

    def run(
        self,
        blocks: Sequence[nn.Module],
        x_BLD: Tensor,
        describe: Describe,
        backend: str,
        *,
        rope: Rope | None = None,
        first_token: bool = False,
        inside: bool = False,
    ) -> Tensor | None:
        """What ``blocks`` make of x, or None where they have to be called one by one.

        describe: asked when something has changed.
        rope: rotations of the last tokens, the same for all images and heads.
        first_token: [B, 1, D], the first token alone.
        inside: the one block is being called, so that its own hooks run anyhow.
        """
        if x_BLD.device.type != "cpu" or not blocks or not is_unwatched(x_BLD):
            return None
        if torch.is_grad_enabled() and (x_BLD.requires_grad or _trains(blocks[0])):
            return None
        if self._plan is None or not self._plan.fits(blocks, x_BLD):
            self._plan = _Plan.of(blocks, x_BLD, describe, backend, inside)
        if self._plan is None or (torch.is_grad_enabled() and self._plan.modules.want_gradients()):
            return None
        with torch.no_grad():
            return self._plan.run(x_BLD, rope, first_token)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockStack:
        return BlockStack()

    def __reduce__(self) -> tuple[type[BlockStack], tuple[()]]:
        return BlockStack, ()


class _NotKept(Exception):
    """A weight's copy, which a plan needs, would not outlive the call."""


class _Plan:
    def __init__(
        self,
        kernels: CpuKernels,
        blocks: Sequence[nn.Module],
        halves: Sequence[Halves],
        x_BLD: Tensor,
        dtype: torch.dtype,
        inside: bool,
    ) -> None:
        self.kernels = kernels
        self.dtype = dtype  # of the products
        self.x_dtype = x_BLD.dtype
        self.weight = halves[0].attention.proj.weight
        self.precision = halves[0].precision
        self.modules = _Modules(blocks, inside)
        self.generation = weight_cache.generation()
        self.copied: list[tuple[weight_cache.Source, Tensor]] = []  # weights that copies were made of
        self.parameters = [p.detach() for one in halves for p in self._parameters(one.attention, one.mlp)]
        attention, mlp, _ = halves[0]
        self.options = attention.heads, attention.scale, attention.norm.eps, mlp.activation

    @classmethod
    def of(
        cls, blocks: Sequence[nn.Module], x_BLD: Tensor, describe: Describe, backend: str, inside: bool
    ) -> _Plan | None:
        """A plan for these blocks, or None where they are not all plain and alike or no backend has the call."""
        described = describe()
        halves = [one for one in described if one is not None and _is_plain(one)]
        if len(halves) < len(described) or len(set(map(_alike, halves))) != 1:
            return None
        dtype = product_dtype(x_BLD, halves[0].attention.proj.weight)
        if x_BLD.dtype not in (dtype, torch.float32):
            return None
        if autocast_dtype(x_BLD) is None and any(w.dtype != dtype for one in halves for w in _weights(one)):
            return None
        kernels = choose("norm_attention", x_BLD, backend, dtype)
        if not isinstance(kernels, CpuKernels):
            return None
        if halves[0].precision == "float" and dtype not in kernels.own_dtypes:
            return None
        try:
            with torch.no_grad():
                plan = cls(kernels, blocks, halves, x_BLD, dtype, inside)
        except _NotKept:
            return None
        return plan if plan.fits(blocks, x_BLD) else None

    def _parameters(self, attention: AttentionHalf, mlp: MlpHalf) -> Iterator[Tensor]:
        """Of one block, in the order of csrc/cpu/halves.cpp and int8_halves.cpp; empty tensors for what is not there."""
        yield from (attention.norm.weight, attention.norm.bias, *self._linear(attention.qkv))
        yield from (*self._linear((attention.proj,)), _NOTHING if attention.gamma is None else attention.gamma)
        yield from (mlp.norm.weight, mlp.norm.bias, *self._linear(mlp.fc1))
        yield from (*self._linear((mlp.fc2,)), _NOTHING if mlp.gamma is None else mlp.gamma)

    def _linear(self, layers: Sequence[Linear]) -> tuple[Tensor, ...]:
        """Weight, its panels and bias of the layers as one, in the products' dtype; or its integers, start, scale and bias."""
        weights = tuple(layer.weight for layer in layers)
        biases = layers[0].bias_parts or tuple(layer.bias for layer in layers)
        bias = self._bias(biases, sum(map(len, weights)) // len(biases))
        if self.precision == "int8":
            return *self._keep(weights, self.kernels.int8_weight(weights)), bias
        return *self._weight(weights), bias

    def _weight(self, weights: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if len(weights) > 1 or weights[0].dtype != self.dtype:
            return self._keep(weights, self.kernels.joined_weight(weights, self.dtype))
        panels = self.kernels.panels(weights[0])
        if panels is None:
            return weights[0], _NOTHING
        return weights[0], self._keep(weights, panels)

    def _bias(self, biases: tuple[Tensor | None, ...], size: int) -> Tensor:
        there = tuple(bias for bias in biases if bias is not None)
        if not there:
            return _NOTHING
        if len(biases) == 1 and (there[0].dtype == self.dtype or self.precision == "int8"):
            return there[0]
        return self._keep(there, self.kernels.joined_bias(biases, size, self.dtype))

    def _keep(self, sources: tuple[Tensor, ...], entry: weight_cache.Kept | None) -> Any:
        if entry is None:
            raise _NotKept
        self.copied.extend(zip(entry.sources, sources, strict=True))
        return entry.value

    def fits(self, blocks: Sequence[nn.Module], x_BLD: Tensor) -> bool:
        """Whether nothing has changed that the plan was made from."""
        return (
            x_BLD.dtype == self.x_dtype
            and product_dtype(x_BLD, self.weight) == self.dtype
            and self.modules.are_still(blocks)
            and self.generation == weight_cache.generation()
            and all(source.fits(weight) for source, weight in self.copied)
        )

    def run(self, x_BLD: Tensor, rope: Rope | None, first_token: bool) -> Tensor:
        return self.kernels.blocks(
            x_BLD.contiguous(), self.parameters, *self.options, rope, first_token, self.precision
        )


class _Modules:
    """Blocks with all their parts, as they were. Compared as whole lists: one by one would take as long as a block.

    The blocks themselves are not held on to, so that whoever keeps a stack beside a block does not keep the block.
    """

    def __init__(self, blocks: Sequence[nn.Module], inside: bool) -> None:
        self.parts = [module for block in blocks for module in block.modules() if module is not block]
        modules = [*blocks, *self.parts]
        self.kinds = [type(module) for module in modules]
        self.attributes = [dict(module.__dict__) for module in modules]
        self.tables = [module._modules for module in modules]
        self.children = [dict(table) for table in self.tables]
        held = [table for module in modules for table in (module._parameters, module._buffers)]
        self.entries = [(table, name, tensor) for table in held for name, tensor in table.items()]
        self.tensors = [tensor for _, _, tensor in self.entries if tensor is not None]
        self.places = [(tensor.data_ptr(), tensor.dtype) for tensor in self.tensors]
        quiet = self.parts if inside else modules
        self.hooks = [hooks for module in quiet for hooks in hooks_of(module)]
        self.watched = any(map(watched, quiet))

    def are_still(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether these are the same, and unwatched."""
        modules = [*blocks, *self.parts]
        try:
            return (
                not self.watched
                and [type(module) for module in modules] == self.kinds
                and [module.__dict__ for module in modules] == self.attributes
                and self.tables == self.children
                and not any(self.hooks)
                and all(table.get(name) is tensor for table, name, tensor in self.entries)
                and [(tensor.data_ptr(), tensor.dtype) for tensor in self.tensors] == self.places
            )
        except (RuntimeError, ValueError):  # an attribute is another tensor or array now, and has no one truth
            return False

    def want_gradients(self) -> bool:
        """Whether one of their parameters does."""
        return any(tensor.requires_grad for tensor in self.tensors)


def _trains(block: nn.Module) -> bool:
    """Whether the first parameter wants a gradient, as in most models that are trained: they need no plan."""
    return next((p.requires_grad for p in block.parameters()), False)


def _alike(block: Halves) -> tuple[Any, ...]:
    """What all blocks have to have in common."""
    attention, mlp, precision = block
    return attention.heads, attention.scale, attention.norm.eps, mlp.activation, precision


def _weights(block: Halves) -> list[Tensor]:
    """Of its products."""
    attention, mlp, _ = block
    return [layer.weight for layer in (*attention.qkv, attention.proj, *mlp.fc1, mlp.fc2)]


def _is_plain(block: Halves) -> bool:
    """Nothing but what the call computes, and parameters it can read where they are."""
    attention, mlp, _ = block
    linears, norms = (*attention.qkv, attention.proj, *mlp.fc1, mlp.fc2), (attention.norm, mlp.norm)
    biases = [bias for layer in linears for bias in layer.bias_parts or (layer.bias,)]
    tensors = [
        attention.gamma,
        mlp.gamma,
        *_weights(block),
        *biases,
        *(t for norm in norms for t in (norm.weight, norm.bias)),
    ]
    return (
        attention.plain
        and mlp.plain
        and attention.norm.eps == mlp.norm.eps
        and mlp.activation in ACTIVATIONS
        and all(t is None or (type(t) in (nn.Parameter, Tensor) and t.is_contiguous()) for t in tensors)
    )
