"""The primitive kernels through raw ones: C++ (``torch.ops.vitfast_C``, CPU and CUDA) or Triton (``vitfast.kernels``).

Raw kernels write into outputs that are allocated here, and take contiguous inputs. Same functions, meaning and shapes as
``plain.py``, which documents them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .arguments import activated_width
from .halves import BlockHalves
from .heads import Heads
from .patches import PatchProducts
from .products import LibraryProducts


def f32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


class RawKernels(LibraryProducts, BlockHalves, PatchProducts):
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
        self.functions.scale_add_forward(residual, branch, f32(scale), f32(drop_path), total)
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
            x, branch, f32(scale), f32(drop_path), f32(weight), f32(bias), eps, total, normed, mean, rstd
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
        self.functions.layer_norm_apply(total, mean, rstd, f32(weight), f32(bias), normed)
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
            f32(weight),
            branch,
            f32(scale),
            f32(drop_path),
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
        self, h: Tensor, d_act: Tensor, kind: str, want_act: bool, d_h: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        d_h = torch.empty_like(h) if d_h is None else d_h
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
        out = qkv.new_empty(qkv.shape[:-3] + qkv.shape[-2:])
        lse = qkv.new_empty(qkv.shape[-2], out.shape[:-2].numel(), dtype=torch.float32)
        self.functions.attention_forward(
            qkv.flatten(0, -4),
            scale,
            bias,
            padding,
            *self._heads(heads),
            *self._lengths(qkv, cu_seqlens, max_seqlen),
            out.flatten(0, -3),
            lse,
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
        padding: Tensor | None,
        heads: Heads,
        want_bias: bool,
        want_norms: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        d_qkv = torch.empty_like(qkv)
        d_bias = torch.empty_like(bias, dtype=torch.float32) if want_bias and bias is not None else None
        # weight's and bias's gradient for either norm
        d_q_norm, d_k_norm = (
            qkv.new_empty(2, qkv.shape[-1], dtype=torch.float32) if want_norms and kind else None
            for kind in (heads.q_norm, heads.k_norm)
        )
        self.functions.attention_backward(
            d_out.flatten(0, -3),
            qkv.flatten(0, -4),
            out.flatten(0, -3),
            lse,
            scale,
            bias,
            padding,
            *self._heads(heads),
            *self._lengths(qkv, cu_seqlens, max_seqlen),
            d_qkv.flatten(0, -4),
            d_bias,
            d_q_norm,
            d_k_norm,
        )
        d_norms = (g for pair in (d_q_norm, d_k_norm) for g in ((None, None) if pair is None else pair))
        return d_qkv, d_bias, tuple(d_norms)

    def _heads(self, heads: Heads) -> tuple[Any, ...]:
        """What the raw attention takes for what happens to q and k before it."""
        return tuple(f32(x) if isinstance(x, Tensor) else x for x in heads)

    def _lengths(self, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[Any, ...]:
        """What the raw attention takes for "where each sequence lies"."""
        if cu_seqlens is None:
            return even_lengths(qkv.shape[0], qkv.shape[1], qkv.device), qkv.shape[1]
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

    def _token_parameter(self, x: Tensor | None) -> Tensor | None:
        """In a dtype that the kernel of assemble_tokens reads."""
        return f32(x)

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
        self.functions.assemble_tokens(projected, *map(self._token_parameter, (bias, pos_embed, prefix)), tokens)
        return tokens


@functools.lru_cache(maxsize=64)
def even_lengths(batch: int, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
