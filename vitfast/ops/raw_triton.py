"""Triton's kernels as a backend's primitives."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arguments import activated_width, nothing
from .heads import Heads
from .raw import RawKernels, f32


class TritonKernels(RawKernels):
    """Kernels of ``vitfast.kernels``; on a plain batch attention takes the length itself instead of offsets.

    Args:
        path: "library" (cuBLAS and one elementwise kernel) or "fused" (Triton's products with their epilogues) for every
            product; None: as the table of configurations has it.
    """

    def __init__(self, path: str | None = None) -> None:
        names = ("layer_norm", "activation", "attention", "patch_embed", "mlp")
        modules = (import_module(f"vitfast.kernels.{m}") for m in names)
        super().__init__(SimpleNamespace(**{k: v for m in modules for k, v in vars(m).items()}))
        self.path = path
        self.options = import_module("vitfast.kernels.attention_heads").HeadOptions

    def _heads(self, heads: Heads) -> tuple[Any, ...]:
        return (self.options(*(x.contiguous() if isinstance(x, Tensor) else x for x in heads)),)

    def _fused_config(self, unit: str, x: Tensor, columns: int) -> tuple[bool, Any]:
        """Whether the product of x [T, I] with ``columns`` outputs is Triton's own, and its tile if it was measured."""
        return self._choice(unit, x.shape[0], columns, x.shape[1], x)

    def _choice(self, unit: str, rows: int, columns: int, depth: int, like: Tensor) -> tuple[bool, Any]:
        """The same of a product in like's dtype and on its device."""
        row = self.functions.product_choice(unit, rows, columns, depth, like.dtype, like.device)
        return (self.path or row.path) == "fused", row.config

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fused, config = self._fused_config("linear", x, weight.shape[0])
        if not fused:
            return super().linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self.functions.linear_forward(x.contiguous(), weight.contiguous(), bias, out, config)
        return out

    def linear_activation(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, keep: bool
    ) -> tuple[Tensor, Tensor]:
        fused, config = self._fused_config(*self._activation_unit(x, weight, kind))
        if not fused:
            h_TO = super().linear(x, weight, bias)  # the library's, whatever the table says of plain products
            return self.activation_forward(h_TO, kind), h_TO if keep else nothing(h_TO)
        act = x.new_empty(x.shape[0], activated_width(weight.shape[0], kind))
        h = x.new_empty(x.shape[0], weight.shape[0]) if keep else None
        self.functions.linear_activation_forward(x.contiguous(), weight.contiguous(), bias, kind, h, act, config)
        return act, nothing(act) if h is None else h

    def linear_again(self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor | None]:
        fused, _ = self._fused_config(*self._activation_unit(x, weight, kind))
        if not fused:
            return super().linear(x, weight, bias), None
        act, h = self.linear_activation(x, weight, bias, kind, True)
        return h, act

    def _activation_unit(self, x: Tensor, weight: Tensor, kind: str) -> tuple[str, Tensor, int]:
        gated = kind == "swiglu"
        return "swiglu" if gated else "linear_activation", x, activated_width(weight.shape[0], kind)

    def linear_residual(
        self,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        drop_path: Tensor | None,
    ) -> Tensor:
        fused, config = self._fused_config("linear_residual", x, weight.shape[0])
        if not fused:
            return self.scale_add(residual, super().linear(x, weight, bias), scale, drop_path)
        total = torch.empty_like(residual)
        self.functions.linear_residual_forward(
            x.contiguous(), weight.contiguous(), bias, residual, scale, f32(drop_path), total, config
        )
        return total

    def hidden_backward(
        self, d_out: Tensor, weight: Tensor, h: Tensor, kind: str, want_act: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        fused, config = self._fused_config("hidden_backward", d_out, weight.shape[1])
        if not fused:
            return super().hidden_backward(d_out, weight, h, kind, want_act)
        d_h, d_bias = torch.empty_like(h), h.new_empty(h.shape[1], dtype=torch.float32)
        act = d_out.new_empty(d_out.shape[0], weight.shape[1]) if want_act else None
        self.functions.hidden_backward(d_out.contiguous(), weight.contiguous(), h, kind, d_h, act, d_bias, config)
        return d_h, act, d_bias

    def embed_patches(
        self,
        images: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pos_embed: Tensor | None,
        prefix: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        added, (D, P), B = (bias, pos_embed, prefix), (weight.shape[0], weight.shape[-1]), images.shape[0]
        N = (images.shape[2] // P) * (images.shape[3] // P)
        fused, _ = self._choice("patch_embed", B * N, D, weight.shape[1] * P * P, weight)
        if not fused:
            return super().embed_patches(images, weight, *added, scale, shift, dtype)
        tokens = images.new_empty(B, N if prefix is None else prefix.shape[0] + N, D, dtype=dtype)
        self.functions.patch_embed_forward(images, weight.contiguous(), *map(f32, added), scale, shift, tokens)
        return tokens

    def patches_weight_grad(
        self, d_projected: Tensor, images: Tensor, P: int, scale: Tensor, shift: Tensor, d_tokens: Tensor
    ) -> Tensor:
        (patches, D), C, dtype = d_projected.shape, images.shape[1], d_projected.dtype
        fused, _ = self._choice("patch_weight", patches, D, C * P * P, d_projected)
        if not fused:
            return super().patches_weight_grad(d_projected, images, P, scale, shift, d_tokens)
        d_weight = images.new_empty(D, C, P, P, dtype=torch.float32)
        self.functions.patch_embed_weight_gradient(images, d_tokens.contiguous(), scale, shift, dtype, d_weight)
        return d_weight.flatten(1)

    def patches_image_grad(
        self,
        d_projected: Tensor,
        weight: Tensor,
        scale: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        d_tokens: Tensor,
    ) -> Tensor:
        patches, D = d_projected.shape
        fused, _ = self._choice("patch_image", patches, D, weight.flatten(1).shape[1], weight)
        if not fused:
            return super().patches_image_grad(d_projected, weight, scale, shape, dtype, d_tokens)
        d_images = d_tokens.new_empty(shape, dtype=dtype)
        self.functions.patch_embed_image_gradient(d_tokens.contiguous(), weight.contiguous(), scale, d_images)
        return d_images

    def _lengths(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Any, ...]:
        if cu_seqlens is None:
            return None, qkv.shape[1], qkv.shape[1]
        return cu_seqlens, max_seqlen, 0
