"""Gradient of the additive attention bias [Bb, Hb, L, L]: dS summed over the sequences and heads it was broadcast to.

Legend in attention_tiles.py. A program owns one [M, N] tile of one bias matrix and walks its share of the sequences and
heads behind it, recomputing dS: two more products than reusing dS would need, but no atomics and no [B, H, L, L]
scratch. With few matrices the walk is split into G parts, whose sums reduce.py adds in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .attention_forward import bias_strides, count_sequences
from .attention_heads import HeadOptions, load_heads, shift_tables
from .attention_tiles import (
    LOG2E,
    bias_matrix,
    bias_tile,
    extent,
    finish_logits,
    load_row_sums,
    load_tile,
    multiply,
    padding_row,
)
from .configs import bias_gradient_config
from .reduce import sum_partials


@triton.jit(do_not_specialize=["seqlen", "T", "sequences", "blocks", "bias_sequences", "bias_heads", "prefix"])
def _bias_gradient_kernel(
    d_out, qkv, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, lse, delta, partials, scale, seqlen, T,
    sequences, blocks, bias_sequences, bias_heads, bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = VO[0]
    tile = tl.program_id(0)
    first_row = tile % blocks * M
    first_col = tile // blocks % blocks * M
    rows = first_row + tl.arange(0, M)
    cols = first_col + tl.arange(0, M)
    matrix_index = tile // blocks // blocks
    G = tl.num_programs(1)
    # The group behind one matrix: all sequences or one, times all heads or one.
    heads = H // bias_heads
    members = sequences // bias_sequences * heads
    total = tl.zeros([M, M], tl.float32)
    for member in range(tl.program_id(1), members, G):
        sequence = matrix_index // bias_heads + member // heads
        head = matrix_index % bias_heads + member % heads
        start, length = extent(cu_seqlens, seqlen, sequence)
        base = qkv + start * 3 * H * E + head * E
        sums = head.to(tl.int64) * T + start
        rope = (cos, sin, prefix)
        if cos is not None:
            rope = shift_tables(cos, sin, start, prefix, COLUMNS, cu_seqlens is not None)
        q0, q1 = load_heads(base, rows, 3 * H * E, length, rope, q_norm, QK, COLUMNS, Q_NORM, True)
        k0, k1 = load_heads(base + H * E, cols, 3 * H * E, length, rope, k_norm, QK, COLUMNS, K_NORM, True)
        v0, v1 = load_tile(base + 2 * H * E, cols, 3 * H * E, length, VO, True)
        g0, g1 = load_tile(d_out + start * H * E + head * E, rows, H * E, length, VO, True)
        row_lse, row_delta = load_row_sums(lse + sums, delta + sums, rows, length)
        matrix, hidden = bias, padding
        if bias is not None:
            matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
        if padding is not None:
            hidden = padding_row(padding, sequence, seqlen)
        logits = finish_logits(
            multiply(q0, q1, k0, k1, QK, PRECISION), matrix, hidden, rows[:, None], cols[None, :], first_row, first_col,
            scale * LOG2E, bias_length, length, True,
        )  # fmt: skip
        weights = tl.exp2(logits - row_lse[:, None])
        total += weights * (multiply(g0, g1, v0, v1, VO, PRECISION) - row_delta[:, None])
    part = (tl.program_id(1) * bias_sequences * bias_heads + matrix_index).to(tl.int64)
    out = partials + part * bias_length * bias_length
    at = bias_tile(out, first_row, first_col, rows[:, None], cols[None, :], bias_length)
    tl.store(at, total, mask=(rows < bias_length)[:, None] & (cols < bias_length)[None, :])


def attention_bias_gradient(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    options: HeadOptions,
    cu_seqlens: torch.Tensor | None,
    seqlen: int,
    d_bias: torch.Tensor,
) -> None:
    """d_bias, fp32 and of the bias's shape, from the row sums lse and delta [H, T] (delta = sum_e out * d_out)."""
    T, _, H, E = qkv.shape
    chip = device.device_properties(qkv.device)
    sequences = count_sequences(T, cu_seqlens, seqlen)
    bias_sequences, bias_heads, L, _ = d_bias.shape
    precision = device.dot_precision(qkv.dtype)
    config = bias_gradient_config(E, qkv.dtype, precision, chip.arch, options.active)
    blocks = triton.cdiv(L, config.tile)
    tiles = bias_sequences * bias_heads * blocks * blocks
    members = sequences // bias_sequences * (H // bias_heads)
    parts = max(1, min(members, config.programs * chip.multiprocessors // tiles))
    partials = d_bias if parts == 1 else d_bias.new_empty(1, parts, d_bias.numel())
    _bias_gradient_kernel[(tiles, parts)](
        d_out, qkv, bias, padding, cu_seqlens, *options.arguments(seqlen), lse, delta, partials, scale, seqlen, T,
        sequences, blocks, bias_sequences, bias_heads, *bias_strides(bias), H, *options.constants(E), config.tile, precision,
        num_warps=config.warps, num_stages=1, maxnreg=config.registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        sum_partials(partials, d_bias)
