"""The primitive kernels in plain PyTorch: backend "torch", on every device and dtype, fp64 included.

Same meaning as the raw kernels (see ``raw.py``). Arithmetic is fp32 (fp64 for fp64 inputs), results are rounded once.

Legend: B images, L tokens, T = B * L rows, D width, F hidden width, H heads, E head dim, N patches, R prefix tokens.
``X`` is the dtype of the residual stream, ``Y`` that of the products.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from .halves import BlockHalves
from .heads import Heads, transform, transform_backward
from .patches import PatchProducts
from .products import LibraryProducts
from .quantize import dequantize_rows


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _row_factor(drop_path: Tensor, rows: int) -> Tensor:
    return _wide(drop_path).repeat_interleave(rows // drop_path.numel()).unsqueeze(1)  # [B] -> [T, 1]


def scale_add(residual_TD: Tensor, branch_TD: Tensor, scale_D: Tensor | None, drop_path_B: Tensor | None) -> Tensor:
    """residual + drop_path * scale * branch -> [T, D] in X."""
    branch = _wide(branch_TD)
    if scale_D is not None:
        branch = branch * _wide(scale_D)
    if drop_path_B is not None and drop_path_B.numel():
        branch = branch * _row_factor(drop_path_B, branch.shape[0])
    return (_wide(residual_TD) + branch).to(residual_TD.dtype)


def layer_norm_forward(
    x_TD: Tensor,
    branch_TD: Tensor | None,
    scale_D: Tensor | None,
    drop_path_B: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total [T, D] X, normed [T, D] ``dtype``, mean [T], rstd [T]); total is x itself without a branch."""
    total = x_TD if branch_TD is None else scale_add(x_TD, branch_TD, scale_D, drop_path_B)
    wide = _wide(total)
    mean = wide.mean(1)
    variance = (wide - mean.unsqueeze(1)).square().mean(1)  # two passes: no cancellation
    rstd = torch.rsqrt(variance + eps)
    return total, layer_norm_apply(total, mean, rstd, weight_D, bias_D, dtype), mean, rstd


def layer_norm_apply(
    total_TD: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The normalised rows again from their statistics -> [T, D] ``dtype``."""
    standard = (_wide(total_TD) - mean_T.unsqueeze(1)) * rstd_T.unsqueeze(1)
    return (standard * _wide(weight_D) + _wide(bias_D)).to(dtype)


def layer_norm_backward(
    d_normed_TD: Tensor,
    d_total_TD: Tensor | None,
    total_TD: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    weight_D: Tensor,
    branch_TD: Tensor | None = None,
    scale_D: Tensor | None = None,
    drop_path_B: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """(d_x [T, D] X, d_branch [T, D] Y or None, d_scale [D] or None, d_weight [D], d_bias [D])."""
    d_normed, rstd = _wide(d_normed_TD), rstd_T.unsqueeze(1)
    standard = (_wide(total_TD) - mean_T.unsqueeze(1)) * rstd
    g = d_normed * _wide(weight_D)
    d_x = rstd * (g - g.mean(1, keepdim=True) - standard * (g * standard).mean(1, keepdim=True))
    if d_total_TD is not None:
        d_x = d_x + _wide(d_total_TD)
    d_branch = d_scale = None
    if branch_TD is not None:
        through = d_x
        if drop_path_B is not None and drop_path_B.numel():
            through = through * _row_factor(drop_path_B, through.shape[0])
        if scale_D is not None:
            d_scale = (through * _wide(branch_TD)).sum(0)
            through = through * _wide(scale_D)
        d_branch = through.to(branch_TD.dtype)
    return d_x.to(total_TD.dtype), d_branch, d_scale, (d_normed * standard).sum(0), d_normed.sum(0)


QUICK = 1.702  # quick_gelu(x) = silu(QUICK * x) / QUICK = x * sigmoid(QUICK * x)


def activation_forward(h_TH: Tensor, kind: str) -> Tensor:
    """act(h) -> [T, F]; H = F, or 2F for "swiglu", the gate's columns first."""
    if kind == "swiglu":
        gate, up = _wide(h_TH).chunk(2, 1)
        return (silu(gate) * up).to(h_TH.dtype)
    if kind == "quick_gelu":
        wide = _wide(h_TH)
        return (wide * torch.sigmoid(QUICK * wide)).to(h_TH.dtype)
    return gelu(h_TH, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_backward(
    h_TH: Tensor, d_act_TF: Tensor, kind: str, want_act: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(d_h [T, H], act(h) [T, F] or None, column sums of d_h [H])."""
    if kind == "swiglu":
        gate, up = _wide(h_TH).chunk(2, 1)
        d_act = _wide(d_act_TF)
        d_h = torch.cat([torch.ops.aten.silu_backward(d_act * up, gate), d_act * silu(gate)], 1).to(h_TH.dtype)
    elif kind == "quick_gelu":
        d_h = torch.ops.aten.silu_backward(_wide(d_act_TF), QUICK * _wide(h_TH)).to(h_TH.dtype)
    else:
        d_h = torch.ops.aten.gelu_backward(d_act_TF, h_TH, approximate="tanh" if kind == "gelu_tanh" else "none")
    return d_h, activation_forward(h_TH, kind) if want_act else None, _wide(d_h).sum(0)


def _sequences(qkv: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Views [S, L, 3, H, E]: one of the whole batch, or one (S = 1) for each packed sequence."""
    if cu_seqlens is None:
        return [qkv]
    bounds = cu_seqlens.tolist()
    return [qkv[a:b].unsqueeze(0) for a, b in itertools.pairwise(bounds)]


def _probabilities(
    q: Tensor, k: Tensor, scale: float, bias: Tensor | None, padding_BL: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) [S, H, L, L] and its log-sum-exp [S, H, L]; a fully masked row gives zeros.

    Not exp(logits - lse): where all logits are far from zero, lse has lost the digits of its logarithm.
    """
    logits = _wide(q @ k.transpose(-2, -1)) * scale
    if bias is not None:
        logits = logits + _wide(bias)
    if padding_BL is not None:
        logits = logits.masked_fill(padding_BL[:, None, None], -math.inf)
    lse = torch.logsumexp(logits, -1)
    return logits.softmax(-1).masked_fill((lse == -math.inf).unsqueeze(-1), 0), lse


def attention_forward(
    qkv: Tensor,
    scale: float,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    padding_BL: Tensor | None,
    heads: Heads,
) -> tuple[Tensor, Tensor]:
    """(out [..., H, E] like qkv without its 3, lse [H, T])."""
    if heads.active:
        qkv = transform(qkv, heads)
    out = qkv.new_empty(qkv.shape[:-3] + qkv.shape[-2:])
    lse = _wide(qkv.new_empty(0)).new_empty(qkv.shape[-2], out.shape[:-2].numel())
    start = 0
    for part in _sequences(qkv, cu_seqlens):
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)  # [S, H, L, E] each
        p, part_lse = _probabilities(q, k, scale, bias, padding_BL)
        rows = part.shape[0] * part.shape[1]
        target = out if cu_seqlens is None else out[start : start + rows].unsqueeze(0)
        target.copy_((p.to(v.dtype) @ v).transpose(1, 2))
        lse[:, start : start + rows] = part_lse.transpose(0, 1).reshape(qkv.shape[-2], rows)
        start += rows
    return out, lse


def attention_backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    scale: float,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    padding_BL: Tensor | None,
    heads: Heads,
    want_bias: bool,
    want_norms: bool,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """(d_qkv like qkv, d_bias in fp32 with bias's shape or None, gradients in fp32 of ``heads.parameters`` or None).

    ``out`` and ``lse_HT`` are for kernels that weigh keys by exp(logits - lse); here the softmax is taken again.
    """
    given, qkv = qkv, transform(qkv, heads) if heads.active else qkv
    d_qkv = torch.empty_like(qkv)
    d_bias = _wide(torch.zeros_like(bias)) if want_bias and bias is not None else None
    start = 0
    for part in _sequences(qkv, cu_seqlens):
        S, L = part.shape[:2]
        q, k, v = part.permute(2, 0, 3, 1, 4).unbind(0)
        d_o = (d_out if cu_seqlens is None else d_out[start : start + L].unsqueeze(0)).transpose(1, 2)
        p, _ = _probabilities(q, k, scale, bias, padding_BL)
        d_p = _wide(d_o @ v.transpose(-2, -1))
        delta = (p * d_p).sum(-1, keepdim=True)  # from p itself, so that it cancels exactly where one key has it all
        d_logits = p * (d_p - delta)
        if d_bias is not None:
            d_bias += d_logits.sum_to_size(d_bias.shape)
        d_s = (d_logits * scale).to(q.dtype)
        target = d_qkv if cu_seqlens is None else d_qkv[start : start + L].unsqueeze(0)
        target[:, :, 0] = (d_s @ k).transpose(1, 2)
        target[:, :, 1] = (d_s.transpose(-2, -1) @ q).transpose(1, 2)
        target[:, :, 2] = (p.to(v.dtype).transpose(-2, -1) @ d_o).transpose(1, 2)
        start += S * L
    if not heads.active:
        return d_qkv, d_bias, (None,) * 4
    d_qkv, d_norms = transform_backward(d_qkv, given, heads, want_norms)
    return d_qkv, d_bias, d_norms


def patchify(images: Tensor, patch: int, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels times scale plus shift, one row for each patch in (channel, row, column) order -> [B * N, C * P * P] ``dtype``."""
    B, C, height, width = images.shape
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    x = images.to(kind) * scale_C.to(kind).view(C, 1, 1) + shift_C.to(kind).view(C, 1, 1)
    x = x.reshape(B, C, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, C * patch * patch).to(dtype)


def unpatchify(d_patches: Tensor, patch: int, scale_C: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The image gradient of ``patchify`` -> ``shape`` = [B, C, height, width] in ``dtype``."""
    B, C, height, width = shape
    x = _wide(d_patches).reshape(B, height // patch, width // patch, C, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return (x.reshape(shape) * scale_C.to(x.dtype).view(C, 1, 1)).to(dtype)


def assemble_tokens(
    projected: Tensor,
    images: int,
    patches: int,
    bias_D: Tensor | None,
    pos_embed: Tensor | None,
    prefix_RD: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Projected patches [B * N, D] + bias + position, behind the prefix tokens -> [B, R + N, D] ``dtype``."""
    D = projected.shape[1]
    tokens = _wide(projected).view(images, patches, D)
    if bias_D is not None:
        tokens = tokens + _wide(bias_D)
    with_prefix = pos_embed is not None and pos_embed.shape[0] != tokens.shape[1]
    if pos_embed is not None and not with_prefix:
        tokens = tokens + _wide(pos_embed)
    if prefix_RD is not None:
        tokens = torch.cat([_wide(prefix_RD).expand(images, -1, -1), tokens], 1)
    if pos_embed is not None and with_prefix:
        tokens = tokens + _wide(pos_embed)
    return tokens.to(dtype)


def int8_linear(
    x_TI: Tensor,
    norm_weight_I: Tensor | None,
    norm_bias_I: Tensor | None,
    eps: float,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    activation: str,
    residual_TO: Tensor | None,
    scale_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """act(y) or residual + scale * y, y the product of rows and weight rounded to their levels -> [T, O] ``dtype``."""
    if norm_weight_I is not None and norm_bias_I is not None:
        wide = torch.float64 if x_TI.dtype == torch.float64 else torch.float32  # not rounded before its levels
        _, x_TI, _, _ = layer_norm_forward(x_TI, None, None, None, norm_weight_I, norm_bias_I, eps, wide)
    y = dequantize_rows(x_TI) @ dequantize_rows(weight_OI).to(_wide(x_TI).dtype).t()
    if bias_O is not None:
        y = y + bias_O
    if activation != "none":
        y = activation_forward(y, activation)
    return y.to(dtype) if residual_TO is None else scale_add(residual_TO, y, scale_O, None)


class PlainKernels(LibraryProducts, BlockHalves, PatchProducts):
    """The functions above and the library's products as one object, as the ops call a backend's primitives."""

    def __getattr__(self, name: str) -> Any:
        return globals()[name]


KERNELS = PlainKernels()
