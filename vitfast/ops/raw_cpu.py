"""The CPU's kernels: C++ for all of a backend's primitives, products included where ours are faster than oneDNN's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import POINTWISE, nothing
from .heads import Heads, Rope
from .quantize import pack_weight, pack_weight_for_tiles
from .raw import RawKernels, even_lengths, f32
from .weight_cache import Kept, derived, kept


class CpuKernels(RawKernels):
    """The CPU's kernels, with our own matrix products where they measure faster than oneDNN's (docs/decisions.md)."""

    def __init__(self) -> None:
        super().__init__()
        capability = self.functions.cpu_capability()
        self.own_dtypes = {torch.float32} if capability.startswith("avx512") or capability == "amx" else set()
        self.has_tiles = capability == "amx"
        # Without tiles of our own (an old compiler) oneDNN's are faster.
        if capability == "amx" or (capability == "avx512_bf16" and not torch.cpu._is_amx_tile_supported()):
            self.own_dtypes.add(torch.bfloat16)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype not in self.own_dtypes:
            return super().linear(x, weight, bias)
        return self._product(x, weight, None, bias)

    def project_patches(self, patches_TK: Tensor, weight_DK: Tensor) -> Tensor:
        if weight_DK.dtype not in self.own_dtypes:
            return super().project_patches(patches_TK, weight_DK)
        # kept in training too, where it is packed once a step either way
        return self._product(patches_TK, *self._constant(weight_DK), None)

    def _token_parameter(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype == torch.bfloat16 else f32(x)

    def linear_activation(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, keep: bool
    ) -> tuple[Tensor, Tensor]:
        if x.dtype not in self.own_dtypes or kind not in POINTWISE:
            return super().linear_activation(x, weight, bias, kind, keep)
        act = x.new_empty(x.shape[0], weight.shape[0])
        before = torch.empty_like(act) if keep else None
        self._linear(x, weight, False, None, bias, kind, None, None, None, before, act)
        return act, nothing(act) if before is None else before

    def linear_residual(
        self,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        drop_path: Tensor | None,
    ) -> Tensor:
        if x.dtype not in self.own_dtypes or residual.dtype not in (x.dtype, torch.float32):
            return super().linear_residual(residual, x, weight, bias, scale, drop_path)
        total = torch.empty_like(residual)
        self._linear(x, weight, False, None, bias, "none", residual, scale, f32(drop_path), None, total)
        return total

    def norm_attention(
        self,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        heads: int,
        scale: float,
        proj_weight: Tensor,
        proj_bias: Tensor | None,
        proj_scale: Tensor | None,
    ) -> Tensor:
        if qkv_weight.dtype not in self.own_dtypes:
            proj = proj_weight, proj_bias, proj_scale
            return super().norm_attention(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, heads, scale, *proj)
        out = torch.empty_like(x)
        B, L, D = x.shape
        lengths = even_lengths(B, L, x.device), L
        qkv = *self._constant(qkv_weight), qkv_bias
        self.functions.norm_attention_forward(
            x.view(B * L, D), norm_weight, norm_bias, eps, *qkv, heads, scale, *lengths, *self._constant(proj_weight),
            proj_bias, proj_scale, out.view(B * L, D),
        )  # fmt: skip
        return out

    def norm_mlp(
        self,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        fc1_weight: Tensor,
        fc1_bias: Tensor | None,
        activation: str,
        fc2_weight: Tensor,
        fc2_bias: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        norm = norm_weight, norm_bias, eps
        if fc1_weight.dtype not in self.own_dtypes:
            return super().norm_mlp(x, *norm, fc1_weight, fc1_bias, activation, fc2_weight, fc2_bias, scale)
        out = torch.empty_like(x)
        fc1, fc2 = (*self._constant(fc1_weight), fc1_bias), (*self._constant(fc2_weight), fc2_bias)
        self.functions.norm_mlp_forward(x, *norm, *fc1, activation, *fc2, scale, out)
        return out

    def blocks(
        self,
        x: Tensor,
        parameters: list[Tensor],
        heads: int,
        scale: float,
        eps: float,
        activation: str,
        rope: Rope | None,
        first_token: bool,
        precision: str = "float",
    ) -> Tensor:
        """Plain pre-norm blocks on x [B, L, D]; parameters as csrc/cpu/halves.cpp or, in 8 bits, int8_halves.cpp lists them.

        rope: of the last tokens of each image. first_token: [B, 1, D], the first token, which does not turn, alone.
        """
        B, L, D = x.shape
        out = x.new_empty(B, 1 if first_token else L, D)
        turns = Heads.of(rope, None, None, torch.float32)[:3]
        options = heads, scale, eps, activation, *turns, even_lengths(B, L, x.device), L, first_token
        run = self.functions.blocks_forward if precision == "float" else self.functions.int8_blocks_forward
        run(x.view(B * L, D), parameters, *options, out.view(-1, D))
        return out

    def int8_linear(
        self,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        residual: Tensor | None,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        packed = derived(weight, "int8", self._pack_int8)
        out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
        norm = f32(norm_weight), f32(norm_bias), eps
        self.functions.int8_linear(x, *norm, *packed, bias, activation, residual, scale, out)
        return out

    def input_grad(self, d_out: Tensor, weight: Tensor) -> Tensor:
        if d_out.dtype not in self.own_dtypes:
            return super().input_grad(d_out, weight)
        d_x = d_out.new_empty(d_out.shape[0], weight.shape[1])
        self._linear(d_out, weight, True, None, None, "none", None, None, None, None, d_x)
        return d_x

    def hidden_backward(
        self, d_out: Tensor, weight: Tensor, h: Tensor, kind: str, want_act: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        d_act = self.input_grad(d_out, weight)
        in_place = d_act if d_act.shape == h.shape else None  # not with a gate; a third less memory to pass
        return self.activation_backward(h, d_act, kind, want_act, in_place)

    def weight_grad(self, d_out: Tensor, x: Tensor) -> Tensor:
        if d_out.dtype not in self.own_dtypes:
            return super().weight_grad(d_out, x)
        d_weight = d_out.new_empty(d_out.shape[1], x.shape[1])
        self.functions.linear_weight_grad(d_out, x, d_weight)
        return d_weight

    def _constant(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """A weight that inference uses again and again, and its panels, which take its size again (fp32 in parts: 1.5 times)."""
        weight = weight.contiguous()
        panels = self.panels(weight)
        return weight, None if panels is None else panels.value

    def panels(self, weight: Tensor) -> Kept | None:
        """A contiguous weight packed for our products, as kept from an earlier call or from now on; None: not ours, or not kept."""
        if weight.dtype not in self.own_dtypes:
            return None
        nbytes = weight.numel() * self._packed_size(weight.dtype)
        return kept((weight,), "panels", self.functions.pack_linear_weight, nbytes)

    def joined_weight(self, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Kept | None:
        """Weights [O, I] below one another in ``dtype``, and that packed; None where it would not be kept."""

        def make(*parts: Tensor) -> tuple[Tensor, Tensor]:
            weight = torch.cat([part.to(dtype) for part in parts])
            return weight, self.functions.pack_linear_weight(weight)

        nbytes = sum(weight.numel() for weight in weights) * (dtype.itemsize + self._packed_size(dtype))
        return kept(weights, ("joined", dtype), make, nbytes)

    def joined_bias(self, biases: tuple[Tensor | None, ...], size: int, dtype: torch.dtype) -> Kept | None:
        """Biases of ``size`` numbers behind one another in ``dtype``, zeros for None; at least one is there."""
        there = tuple(bias is not None for bias in biases)

        def make(*given: Tensor) -> Tensor:
            left = iter(given)
            return torch.cat([(next(left) if one else torch.zeros(size, device="cpu")).to(dtype) for one in there])

        given = tuple(bias for bias in biases if bias is not None)
        return kept(given, ("joined", dtype, there, size), make, size * len(biases) * dtype.itemsize)

    def int8_weight(self, weights: tuple[Tensor, ...]) -> Kept | None:
        """Weights [O, I] below one another as ``int8_linear`` makes one: packed integers, start, scale; None where it would not be
        kept."""
        if len(weights) == 1:
            kind, make = "int8", self._pack_int8
        else:
            kind, make = "int8 joined", lambda *parts: self._pack_int8(torch.cat(parts))
        return kept(weights, kind, make, sum(weight.numel() + 8 * len(weight) for weight in weights))

    @property
    def _pack_int8(self) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        return pack_weight_for_tiles if self.has_tiles else pack_weight

    def _packed_size(self, dtype: torch.dtype) -> int:
        """Bytes of a weight's number in its panels: fp32 goes to tiles as three parts in bf16."""
        return 6 if self.has_tiles and dtype == torch.float32 else dtype.itemsize

    def _product(self, x: Tensor, weight: Tensor, panels: Tensor | None, bias: Tensor | None) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        self._linear(x, weight, False, panels, bias, "none", None, None, None, None, out)
        return out

    def _linear(self, x: Tensor, weight: Tensor, transposed: bool, *rest: Any) -> None:
        self.functions.linear(x.contiguous(), weight.contiguous(), transposed, *rest)
