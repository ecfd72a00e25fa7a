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
from .products import LibraryProducts


def _f32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class RawKernels(LibraryProducts):
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
    ) -> tuple[Tensor, Tensor]:
        out = qkv.new_empty(qkv.shape[:-3] + qkv.shape[-2:])
        lse = qkv.new_empty(qkv.shape[-2], out.shape[:-2].numel(), dtype=torch.float32)
        self.functions.attention_forward(
            qkv.flatten(0, -4), scale, bias, *self._lengths(qkv, cu_seqlens, max_seqlen), out.flatten(0, -3), lse
        )
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
        want_bias: bool,
    ) -> tuple[Tensor, Tensor | None]:
        d_qkv = torch.empty_like(qkv)
        d_bias = torch.empty_like(bias, dtype=torch.float32) if want_bias and bias is not None else None
        self.functions.attention_backward(
            d_out.flatten(0, -3),
            qkv.flatten(0, -4),
            out.flatten(0, -3),
            lse,
            scale,
            bias,
            *self._lengths(qkv, cu_seqlens, max_seqlen),
            d_qkv.flatten(0, -4),
            d_bias,
        )
        return d_qkv, d_bias

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
        vectors_of_16 = self.functions.cpu_capability() in ("avx512", "avx512_bf16")
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

    def _fused_config(self, unit: str, x: Tensor, columns: int) -> tuple[bool, Any]:
        """Whether the product of x [T, I] with ``columns`` outputs is Triton's own, and its tile if it was measured."""
        row = self.functions.product_choice(unit, x, columns)
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
            x.contiguous(), weight.contiguous(), bias, residual, scale, _f32(drop_path), total, config
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

    def _lengths(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Any, ...]:
        if cu_seqlens is None:
            return None, qkv.shape[1], qkv.shape[1]
        return cu_seqlens, max_seqlen, 0


@functools.lru_cache(maxsize=64)
def _even_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
