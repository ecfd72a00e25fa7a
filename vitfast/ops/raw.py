"""The primitive kernels through raw ones: C++ (``torch.ops.vitfast_C``, CPU and CUDA) or Triton (``vitfast.kernels``).

Raw kernels write into outputs that are allocated here, and take contiguous inputs. Same functions, meaning and shapes as
``plain.py``, which documents them.
"""

from __future__ import annotations

import functools
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .arguments import POINTWISE, activated_width, nothing
from .halves import BlockHalves
from .heads import Heads, transform, transform_backward
from .products import LibraryProducts
from .quantize import pack_weight
from .weight_cache import derived


def _f32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class RawKernels(LibraryProducts, BlockHalves):
    """Kernels of the C++ extension; the dispatcher picks the CPU or the CUDA one by the tensors' device."""

    def __init__(self, functions: Any = None) -> None:
        self.functions = functions or torch.ops.vitfast_C

    def scale_add(
        self,
        residual: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        drop_path: Tensor | None,
    ) -> Tensor:
        total = torch.empty_like(residual)
        self.functions.scale_add_forward(residual, branch, _f32(scale), _f32(drop_path), total)
        return total

    def layer_norm_forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        scale: Tensor | None,
        drop_path: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = None if branch is None else torch.empty_like(x)
        normed = torch.empty_like(x, dtype=dtype)
        mean = x.new_empty(x.shape[0], dtype=torch.float32)
        rstd = torch.empty_like(mean)
        self.functions.layer_norm_forward(
            x, branch, _f32(scale), _f32(drop_path), _f32(weight), _f32(bias), eps, total, normed, mean, rstd
        )
        return x if total is None else total, normed, mean, rstd

    def layer_norm_apply(
        self,
        total: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        normed = torch.empty_like(total, dtype=dtype)
        self.functions.layer_norm_apply(total, mean, rstd, _f32(weight), _f32(bias), normed)
        return normed

    def layer_norm_backward(
        self,
        d_normed: Tensor,
        d_total: Tensor | None,
        total: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        branch: Tensor | None = None,
        scale: Tensor | None = None,
        drop_path: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        d_x = torch.empty_like(total)
        d_branch = None if branch is None else torch.empty_like(branch)
        d_weight = total.new_empty(total.shape[1], dtype=torch.float32)
        d_bias = torch.empty_like(d_weight)
        d_scale = None if branch is None or scale is None else torch.empty_like(d_weight)
        self.functions.layer_norm_backward(
            d_normed,
            d_total,
            total,
            mean,
            rstd,
            _f32(weight),
            branch,
            _f32(scale),
            _f32(drop_path),
            d_x,
            d_branch,
            d_scale,
            d_weight,
            d_bias,
        )
        return d_x, d_branch, d_scale, d_weight, d_bias

    def activation_forward(self, h: Tensor, kind: str) -> Tensor:
        act = h.new_empty(h.shape[0], activated_width(h.shape[1], kind))
        self.functions.activation_forward(h, kind, act)
        return act

    def activation_backward(
        self, h: Tensor, d_act: Tensor, kind: str, want_act: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        d_h = torch.empty_like(h)
        act = torch.empty_like(d_act) if want_act else None
        d_bias = h.new_empty(h.shape[1], dtype=torch.float32)
        self.functions.activation_backward(h, d_act, kind, d_h, act, d_bias)
        return d_h, act, d_bias

    def attention_forward(
        self,
        qkv: Tensor,
        scale: float,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        padding: Tensor | None,
        heads: Heads,
    ) -> tuple[Tensor, Tensor]:
        if heads.active:
            qkv = transform(qkv, heads)
        out = qkv.new_empty(qkv.shape[:-3] + qkv.shape[-2:])
        lse = qkv.new_empty(qkv.shape[-2], out.shape[:-2].numel(), dtype=torch.float32)
        lengths = self._lengths(qkv, cu_seqlens, max_seqlen)
        self.functions.attention_forward(qkv.flatten(0, -4), scale, bias, padding, *lengths, out.flatten(0, -3), lse)
        return out, lse

    def attention_backward(
        self,
        d_out: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int,
        padding: Tensor | None,
        heads: Heads,
        want_bias: bool,
        want_norms: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        given, qkv = qkv, transform(qkv, heads) if heads.active else qkv
        d_qkv = torch.empty_like(qkv)
        d_bias = torch.empty_like(bias, dtype=torch.float32) if want_bias and bias is not None else None
        self.functions.attention_backward(
            d_out.flatten(0, -3),
            qkv.flatten(0, -4),
            out.flatten(0, -3),
            lse,
            scale,
            bias,
            padding,
            *self._lengths(qkv, cu_seqlens, max_seqlen),
            d_qkv.flatten(0, -4),
            d_bias,
        )
        if not heads.active:
            return d_qkv, d_bias, (None,) * 4
        d_qkv, d_norms = transform_backward(d_qkv, given, heads, want_norms)
        return d_qkv, d_bias, d_norms

    def _lengths(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Any, ...]:
        """What the raw attention takes for "where each sequence lies"."""
        if cu_seqlens is None:
            return _even_lengths(qkv.shape[0], qkv.shape[1], qkv.device), qkv.shape[1]
        return cu_seqlens, max_seqlen

    def patchify(self, images: Tensor, patch: int, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
        B, C, height, width = images.shape
        patches = images.new_empty(B * (height // patch) * (width // patch), C * patch * patch, dtype=dtype)
        self.functions.patchify(images, patch, scale, shift, patches)
        return patches

    def unpatchify(
        self, d_patches: Tensor, patch: int, scale: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        d_images = d_patches.new_empty(shape, dtype=dtype)
        self.functions.unpatchify(d_patches, patch, scale, d_images)
        return d_images

    def assemble_tokens(
        self,
        projected: Tensor,
        images: int,
        patches: int,
        bias: Tensor | None,
        pos_embed: Tensor | None,
        prefix: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        R = 0 if prefix is None else prefix.shape[0]
        tokens = projected.new_empty(images, R + patches, projected.shape[1], dtype=dtype)
        self.functions.assemble_tokens(projected, _f32(bias), _f32(pos_embed), _f32(prefix), tokens)
        return tokens


class CpuKernels(RawKernels):
    """The CPU's kernels, with our own matrix products where they measure faster than oneDNN's (docs/decisions.md)."""

    def __init__(self) -> None:
        super().__init__()
        vectors_of_16 = self.functions.cpu_capability().startswith("avx512")
        self.own_dtypes = {torch.float32} if vectors_of_16 else set()
        if self.functions.cpu_capability() == "avx512_bf16" and not torch.cpu._is_amx_tile_supported():
            self.own_dtypes.add(torch.bfloat16)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype not in self.own_dtypes:
            return super().linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        self._linear(x, weight, False, bias, "none", None, None, None, None, out)
        return out

    def linear_activation(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, keep: bool
    ) -> tuple[Tensor, Tensor]:
        if x.dtype not in self.own_dtypes or kind not in POINTWISE:
            return super().linear_activation(x, weight, bias, kind, keep)
        act = x.new_empty(x.shape[0], weight.shape[0])
        before = torch.empty_like(act) if keep else None
        self._linear(x, weight, False, bias, kind, None, None, None, before, act)
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
        self._linear(x, weight, False, bias, "none", residual, scale, _f32(drop_path), None, total)
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
        *proj: Any,
    ) -> Tensor:
        if qkv_weight.dtype not in self.own_dtypes:
            return super().norm_attention(x, norm_weight, norm_bias, eps, qkv_weight, qkv_bias, heads, scale, *proj)
        out = torch.empty_like(x)
        B, L, D = x.shape
        lengths = _even_lengths(B, L, x.device), L
        weights = norm_weight, norm_bias, eps, qkv_weight.contiguous(), qkv_bias
        self.functions.norm_attention_forward(
            x.view(B * L, D), *weights, heads, scale, *lengths, proj[0].contiguous(), *proj[1:], out.view(B * L, D)
        )
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
        fc1, fc2 = (fc1_weight.contiguous(), fc1_bias), (fc2_weight.contiguous(), fc2_bias)
        self.functions.norm_mlp_forward(x, *norm, *fc1, activation, *fc2, scale, out)
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
        packed = derived(weight, "int8", pack_weight)
        out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
        norm = _f32(norm_weight), _f32(norm_bias), eps
        self.functions.int8_linear(x, *norm, *packed, bias, activation, residual, scale, out)
        return out

    def input_grad(self, d_out: Tensor, weight: Tensor) -> Tensor:
        if d_out.dtype not in self.own_dtypes:
            return super().input_grad(d_out, weight)
        d_x = d_out.new_empty(d_out.shape[0], weight.shape[1])
        self._linear(d_out, weight, True, None, "none", None, None, None, None, d_x)
        return d_x

    def weight_grad(self, d_out: Tensor, x: Tensor) -> Tensor:
        if d_out.dtype not in self.own_dtypes:
            return super().weight_grad(d_out, x)
        d_weight = d_out.new_empty(d_out.shape[1], x.shape[1])
        self.functions.linear_weight_grad(d_out, x, d_weight)
        return d_weight

    def _linear(self, x: Tensor, weight: Tensor, transposed: bool, *rest: Any) -> None:
        self.functions.linear(x.contiguous(), weight.contiguous(), transposed, *rest)


class TritonKernels(RawKernels):
    """Kernels of ``vitfast.kernels``; on a plain batch attention takes the length itself instead of offsets."""

    def __init__(self) -> None:
        modules = (
            import_module(f"vitfast.kernels.{m}") for m in ("layer_norm", "activation", "attention", "patch_embed")
        )
        super().__init__(SimpleNamespace(**{k: v for m in modules for k, v in vars(m).items()}))

    def _lengths(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Any, ...]:
        if cu_seqlens is None:
            return None, qkv.shape[1], qkv.shape[1]
        return cu_seqlens, max_seqlen, 0


@functools.lru_cache(maxsize=64)
def _even_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
