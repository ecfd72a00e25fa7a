"""Attention forward from packed qkv [T, 3, H, E] to [T, H, E], read and written in place: no permute, no copy.

Legend in attention_tiles.py; M queries of one program, N keys of one step. Dao, "FlashAttention-2", arXiv:2307.08691
for the looped kernel's online softmax. Sequences short enough to keep one row of logits in registers take the one-pass
kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .attention_heads import HeadOptions, load_heads, shift_tables
from .attention_tiles import (
    LN2,
    LOG2E,
    accumulate,
    bias_matrix,
    finish_logits,
    load_tile,
    locate,
    multiply,
    padding_row,
    store_tile,
    zeros_tile,
)
from .configs import attention_forward_config, tail_size


@triton.jit
def _logits(
    q0, q1, keys, rope, k_norm, bias, padding, rows, first_row, begin, scale_log2, stride, bias_length, length,
    QK: tl.constexpr, COLUMNS: tl.constexpr, K_NORM: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, N] logits of keys begin .. begin + N; -inf past the sequence's end (only looked for under MASK)."""
    cols = begin + tl.arange(0, N)
    k0, k1 = load_heads(keys, cols, stride, length, rope, k_norm, QK, COLUMNS, K_NORM, MASK)
    return finish_logits(
        multiply(q0, q1, k0, k1, QK, PRECISION), bias, padding, rows[:, None], cols[None, :], first_row, begin,
        scale_log2, bias_length, length, MASK,
    )  # fmt: skip


@triton.jit
def _add_values(
    sum0, sum1, weights, values, begin, stride, length,
    VO: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    v0, v1 = load_tile(values, begin + tl.arange(0, N), stride, length, VO, MASK)
    return accumulate(sum0, sum1, weights, v0, v1, VO, PRECISION)


@triton.jit
def _finite(peak):
    """A row whose keys are all masked has peak -inf; subtracting 0 instead keeps its weights exp2(-inf) = 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _finish(out, lse, sum0, sum1, peak, total, rows, start, head, T, length, H: tl.constexpr, VO: tl.constexpr):
    """Divide by the sum of weights and store; a fully masked row gives 0 and lse -inf."""
    E: tl.constexpr = VO[0]
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    store_tile(
        out + start * H * E + head * E, sum0 * inverse[:, None], sum1 * inverse[:, None], rows, H * E, length, VO
    )
    logsum = tl.where(empty, float("-inf"), (peak + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse + head.to(tl.int64) * T + start + rows, logsum, mask=rows < length)


@triton.jit(do_not_specialize=["seqlen", "T", "blocks", "prefix"])
def _one_pass_kernel(
    qkv, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, out, lse, scale, seqlen, T, blocks,
    bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys in up to three power-of-two chunks N0 + N1 + N2 (197 = 128 + 64 + 16, 11 masked), all logits in registers.

    Of a plain batch only the last chunk can pass the end of the sequence; packed sequences can end in any.
    """
    PACKED: tl.constexpr = cu_seqlens is not None
    E: tl.constexpr = VO[0]
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * M >= length:
        return
    stride: tl.constexpr = 3 * H * E
    base = qkv + start * stride + head * E
    keys = base + H * E
    values = base + 2 * H * E
    matrix, hidden = bias, padding
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    if padding is not None:
        hidden = padding_row(padding, sequence, seqlen)
    rope = (cos, sin, prefix)
    if cos is not None:
        rope = shift_tables(cos, sin, start, prefix, COLUMNS, PACKED)
    first = block * M
    rows = first + tl.arange(0, M)
    scale_log2 = scale * LOG2E
    q0, q1 = load_heads(base, rows, stride, length, rope, q_norm, QK, COLUMNS, Q_NORM, True)

    MASK0: tl.constexpr = PACKED or N1 == 0
    MASK1: tl.constexpr = PACKED or N2 == 0
    logits0 = _logits(
        q0, q1, keys, rope, k_norm, matrix, hidden, rows, first, 0, scale_log2, stride, bias_length, length,
        QK, COLUMNS, K_NORM, N0, MASK0, PRECISION,
    )  # fmt: skip
    peak = tl.max(logits0, axis=1)
    if N1 > 0:
        logits1 = _logits(
            q0, q1, keys, rope, k_norm, matrix, hidden, rows, first, N0, scale_log2, stride, bias_length, length,
            QK, COLUMNS, K_NORM, N1, MASK1, PRECISION,
        )  # fmt: skip
        peak = tl.maximum(peak, tl.max(logits1, axis=1))
    if N2 > 0:
        logits2 = _logits(
            q0, q1, keys, rope, k_norm, matrix, hidden, rows, first, N0 + N1, scale_log2, stride, bias_length, length,
            QK, COLUMNS, K_NORM, N2, True, PRECISION,
        )  # fmt: skip
        peak = tl.maximum(peak, tl.max(logits2, axis=1))
    shift = _finite(peak)[:, None]

    sum0, sum1 = zeros_tile(M, VO)
    weights0 = tl.exp2(logits0 - shift)
    total = tl.sum(weights0, axis=1)
    sum0, sum1 = _add_values(sum0, sum1, weights0, values, 0, stride, length, VO, N0, MASK0, PRECISION)
    if N1 > 0:
        weights1 = tl.exp2(logits1 - shift)
        total += tl.sum(weights1, axis=1)
        sum0, sum1 = _add_values(sum0, sum1, weights1, values, N0, stride, length, VO, N1, MASK1, PRECISION)
    if N2 > 0:
        weights2 = tl.exp2(logits2 - shift)
        total += tl.sum(weights2, axis=1)
        sum0, sum1 = _add_values(sum0, sum1, weights2, values, N0 + N1, stride, length, VO, N2, True, PRECISION)
    _finish(out, lse, sum0, sum1, peak, total, rows, start, head, T, length, H, VO)


@triton.jit
def _online_step(
    q0, q1, keys, values, rope, k_norm, bias, padding, sum0, sum1, peak, total, rows, first, begin, scale_log2, stride,
    bias_length, length,
    QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr, K_NORM: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take in keys begin .. begin + N, rescaling what was summed under a lower peak."""
    logits = _logits(
        q0, q1, keys, rope, k_norm, bias, padding, rows, first, begin, scale_log2, stride, bias_length, length,
        QK, COLUMNS, K_NORM, N, MASK, PRECISION,
    )  # fmt: skip
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    shift = _finite(higher)
    weights = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, axis=1)
    sum0 = sum0 * fade[:, None]
    if VO[2] > 0:
        sum1 = sum1 * fade[:, None]
    else:
        sum1 = sum0
    sum0, sum1 = _add_values(sum0, sum1, weights, values, begin, stride, length, VO, N, MASK, PRECISION)
    return sum0, sum1, higher, total


@triton.jit(do_not_specialize=["seqlen", "T", "blocks", "prefix"])
def _looped_kernel(
    qkv, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, out, lse, scale, seqlen, T, blocks,
    bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Whole steps of N keys without masks, then the rest in steps of TAIL keys (577 = 9 * 64 + 1: one tail of 16).

    The tail is a loop even where it runs once: as straight code its loads are all issued at once and spill.
    """
    E: tl.constexpr = VO[0]
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * M >= length:
        return
    stride: tl.constexpr = 3 * H * E
    base = qkv + start * stride + head * E
    keys = base + H * E
    values = base + 2 * H * E
    matrix, hidden = bias, padding
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    if padding is not None:
        hidden = padding_row(padding, sequence, seqlen)
    rope = (cos, sin, prefix)
    if cos is not None:
        rope = shift_tables(cos, sin, start, prefix, COLUMNS, cu_seqlens is not None)
    first = block * M
    rows = first + tl.arange(0, M)
    scale_log2 = scale * LOG2E
    q0, q1 = load_heads(base, rows, stride, length, rope, q_norm, QK, COLUMNS, Q_NORM, True)
    sum0, sum1 = zeros_tile(M, VO)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    whole = length // N * N
    for begin in range(0, whole, N):
        sum0, sum1, peak, total = _online_step(
            q0, q1, keys, values, rope, k_norm, matrix, hidden, sum0, sum1, peak, total, rows, first, begin,
            scale_log2, stride, bias_length, length, QK, VO, COLUMNS, K_NORM, N, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        for begin in tl.range(whole, length, TAIL, num_stages=1):
            sum0, sum1, peak, total = _online_step(
                q0, q1, keys, values, rope, k_norm, matrix, hidden, sum0, sum1, peak, total, rows, first, begin,
                scale_log2, stride, bias_length, length, QK, VO, COLUMNS, K_NORM, TAIL, True, PRECISION,
            )  # fmt: skip
    _finish(out, lse, sum0, sum1, peak, total, rows, start, head, T, length, H, VO)


def bias_strides(bias: torch.Tensor | None) -> tuple[int, int, int]:
    """Strides over sequences and heads (0 where broadcast) and the row length of a contiguous bias [Bb, Hb, L, L]."""
    if bias is None:
        return 0, 0, 0
    sequences, heads, L, _ = bias.shape
    return (heads * L * L if sequences > 1 else 0), (L * L if heads > 1 else 0), L


def count_sequences(T: int, cu_seqlens: torch.Tensor | None, seqlen: int) -> int:
    return T // seqlen if cu_seqlens is None else cu_seqlens.shape[0] - 1


def as_bytes(padding: torch.Tensor | None) -> torch.Tensor | None:
    return None if padding is None else padding.view(torch.uint8)


@device.launcher
def attention_forward(
    qkv: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    options: HeadOptions,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    seqlen: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """out [T, H, E] = softmax(scale * q k^T + bias) v of qkv [T, 3, H, E]; lse [H, T] fp32, natural logarithm.

    A plain batch passes seqlen > 0, and cu_seqlens and max_seqlen are not looked at; packed sequences pass seqlen = 0.
    bias is contiguous [Bb, Hb, L, L] with Bb in {1, B}, Hb in {1, H}; padding bool [B, L], true for keys that nobody sees.
    A row without any key to see gives 0, lse -inf. options: what happens to q and k first.
    """
    T, _, H, E = qkv.shape
    if seqlen:
        cu_seqlens, max_seqlen = None, seqlen
    if T == 0 or max_seqlen == 0:
        return
    precision = device.dot_precision(qkv.dtype)
    arch = device.device_properties(qkv.device).arch
    config = attention_forward_config(
        max_seqlen, E, qkv.dtype, precision, arch, bias is not None or padding is not None, options.active
    )
    blocks = triton.cdiv(max_seqlen, config.queries)
    grid = (blocks * H * count_sequences(T, cu_seqlens, seqlen),)
    arguments = (
        qkv, bias, as_bytes(padding), cu_seqlens, *options.arguments(seqlen), out, lse, scale, seqlen, T, blocks,
        *bias_strides(bias), H, *options.constants(E),
    )  # fmt: skip
    if config.chunks:
        _one_pass_kernel[grid](
            *arguments,
            config.queries,
            *config.chunks,
            precision,
            num_warps=config.warps,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )
    else:
        tail = tail_size(config.keys, seqlen, qkv.dtype)
        _looped_kernel[grid](
            *arguments, config.queries, config.keys, tail, precision, num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
            maxnreg=config.registers,
        )  # fmt: skip
