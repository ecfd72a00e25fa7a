"""Attention backward: packed d_qkv [T, 3, H, E] from d_out [T, H, E], without atomics, the same bits every run.

Legend in attention_tiles.py; P softmax weights, S logits, delta[row] = sum_e out * d_out; a tile [N, M] has keys along
rows and queries along columns, so that dV = P d_out and dK = dS q need no transposition. From Dao, arXiv:2307.08691,
Algorithm 2, with dQ summed by its own pass instead of by atomics; a sequence whose keys fit in one program's registers
needs one pass only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .attention_bias import attention_bias_gradient
from .attention_forward import bias_strides, count_sequences
from .attention_tiles import (
    LOG2E,
    accumulate,
    add_bias,
    bias_matrix,
    load_lse,
    load_row_sums,
    load_tile,
    locate,
    multiply,
    store_tile,
    zeros_tile,
)
from .configs import DELTA_ROWS, attention_backward_config, split_head_dim, tail_size


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    out, d_out, delta, T, H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, R: tl.constexpr
):
    """delta [H, T] = sum over E of out * d_out, R rows of one head per program."""
    head = tl.program_id(1)
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    o0, o1 = load_tile(out + head * E, rows, H * E, T, E, E0, E1, True)
    g0, g1 = load_tile(d_out + head * E, rows, H * E, T, E, E0, E1, True)
    result = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), axis=1)
    if E1 > 0:
        result += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), axis=1)
    tl.store(delta + head.to(tl.int64) * T + rows, result, mask=rows < T)


@triton.jit
def _weights(
    k0, k1, q0, q1, bias, lse, rows, cols, scale_log2, bias_length, length,
    E1: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P [N, M] of keys `cols` and queries `rows`. Keys past the end get 0, not exp2(-lse), which can be infinite."""
    logits = multiply(k0, k1, q0, q1, E1, PRECISION) * scale_log2
    logits = add_bias(logits, bias, rows[None, :], cols[:, None], bias_length, length)
    if MASK:
        logits = tl.where((cols < length)[:, None], logits, float("-inf"))
    return tl.exp2(logits - lse[None, :])


@triton.jit
def _keys_step(
    k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, lse, delta, rows, cols, scale_log2, bias_length, length,
    E1: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what queries q [M, E] with output gradient g [M, E] give to dK and dV [N, E]; returns dS [N, M] as well."""
    weights = _weights(k0, k1, q0, q1, bias, lse, rows, cols, scale_log2, bias_length, length, E1, MASK, PRECISION)
    dv0, dv1 = accumulate(dv0, dv1, weights, g0, g1, E1, PRECISION)
    d_weights = multiply(v0, v1, g0, g1, E1, PRECISION)
    d_logits = (weights * (d_weights - delta[None, :])).to(q0.dtype)
    dk0, dk1 = accumulate(dk0, dk1, d_logits, q0, q1, E1, PRECISION)
    return dk0, dk1, dv0, dv1, d_logits


@triton.jit
def _keys_from_queries(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, bias, lse, delta, begin, cols, scale_log2,
    bias_length, length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, M: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = begin + tl.arange(0, M)
    q0, q1 = load_tile(queries, rows, 3 * H * E, length, E, E0, E1, MASK)
    g0, g1 = load_tile(gradients, rows, H * E, length, E, E0, E1, MASK)
    row_lse, row_delta = load_row_sums(lse, delta, rows, length)
    dk0, dk1, dv0, dv1, _d_logits = _keys_step(
        k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, row_lse, row_delta, rows, cols, scale_log2,
        bias_length, length, E1, False, PRECISION,
    )  # fmt: skip
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["seqlen", "T", "blocks"])
def _keys_kernel(
    d_out, qkv, bias, cu_seqlens, lse, delta, d_qkv, scale, seqlen, T, blocks, bias_b, bias_h, bias_length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of N keys, looping over all queries. Keys past the end only reach their own rows, not stored."""
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * N >= length:
        return
    queries = qkv + start * 3 * H * E + head * E
    gradients = d_out + start * H * E + head * E
    sums = head.to(tl.int64) * T + start
    matrix = bias
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    cols = block * N + tl.arange(0, N)
    k0, k1 = load_tile(queries + H * E, cols, 3 * H * E, length, E, E0, E1, True)
    v0, v1 = load_tile(queries + 2 * H * E, cols, 3 * H * E, length, E, E0, E1, True)
    dk0, dk1 = zeros_tile(N, E0, E1)
    dv0, dv1 = zeros_tile(N, E0, E1)
    scale_log2 = scale * LOG2E
    whole = length // M * M
    for begin in range(0, whole, M):
        dk0, dk1, dv0, dv1 = _keys_from_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, matrix, lse + sums, delta + sums, begin, cols,
            scale_log2, bias_length, length, H, E, E0, E1, M, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        for begin in tl.range(whole, length, TAIL, num_stages=1):
            dk0, dk1, dv0, dv1 = _keys_from_queries(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, matrix, lse + sums, delta + sums, begin, cols,
                scale_log2, bias_length, length, H, E, E0, E1, TAIL, True, PRECISION,
            )  # fmt: skip
    target = d_qkv + start * 3 * H * E + head * E
    store_tile(target + H * E, dk0 * scale, dk1 * scale, cols, 3 * H * E, length, E, E0, E1)
    store_tile(target + 2 * H * E, dv0, dv1, cols, 3 * H * E, length, E, E0, E1)


@triton.jit
def _queries_step(
    q0, q1, g0, g1, dq0, dq1, keys, values, bias, lse, delta, rows, begin, scale_log2, bias_length, length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what N keys give to dQ [M, E]; tiles are [M, N] here."""
    cols = begin + tl.arange(0, N)
    k0, k1 = load_tile(keys, cols, 3 * H * E, length, E, E0, E1, MASK)
    v0, v1 = load_tile(values, cols, 3 * H * E, length, E, E0, E1, MASK)
    logits = multiply(q0, q1, k0, k1, E1, PRECISION) * scale_log2
    logits = add_bias(logits, bias, rows[:, None], cols[None, :], bias_length, length)
    if MASK:
        logits = tl.where((cols < length)[None, :], logits, float("-inf"))
    weights = tl.exp2(logits - lse[:, None])
    d_logits = weights * (multiply(g0, g1, v0, v1, E1, PRECISION) - delta[:, None])
    return accumulate(dq0, dq1, d_logits, k0, k1, E1, PRECISION)


@triton.jit(do_not_specialize=["seqlen", "T", "blocks"])
def _queries_kernel(
    d_out, qkv, bias, cu_seqlens, lse, delta, d_qkv, scale, seqlen, T, blocks, bias_b, bias_h, bias_length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of M queries, looping over all keys."""
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * M >= length:
        return
    base = qkv + start * 3 * H * E + head * E
    sums = head.to(tl.int64) * T + start
    matrix = bias
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    rows = block * M + tl.arange(0, M)
    q0, q1 = load_tile(base, rows, 3 * H * E, length, E, E0, E1, True)
    g0, g1 = load_tile(d_out + start * H * E + head * E, rows, H * E, length, E, E0, E1, True)
    row_lse, row_delta = load_row_sums(lse + sums, delta + sums, rows, length)
    dq0, dq1 = zeros_tile(M, E0, E1)
    scale_log2 = scale * LOG2E
    whole = length // N * N
    for begin in range(0, whole, N):
        dq0, dq1 = _queries_step(
            q0, q1, g0, g1, dq0, dq1, base + H * E, base + 2 * H * E, matrix, row_lse, row_delta, rows, begin,
            scale_log2, bias_length, length, H, E, E0, E1, N, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        for begin in tl.range(whole, length, TAIL, num_stages=1):
            dq0, dq1 = _queries_step(
                q0, q1, g0, g1, dq0, dq1, base + H * E, base + 2 * H * E, matrix, row_lse, row_delta, rows, begin,
                scale_log2, bias_length, length, H, E, E0, E1, TAIL, True, PRECISION,
            )  # fmt: skip
    target = d_qkv + start * 3 * H * E + head * E
    store_tile(target, dq0 * scale, dq1 * scale, rows, 3 * H * E, length, E, E0, E1)


@triton.jit
def _load_chunk(
    keys, begin, length, H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, N: tl.constexpr
):
    """K and V of N keys, and zeros for their gradients."""
    cols = begin + tl.arange(0, N)
    k0, k1 = load_tile(keys, cols, 3 * H * E, length, E, E0, E1, True)
    v0, v1 = load_tile(keys + H * E, cols, 3 * H * E, length, E, E0, E1, True)
    dk0, dk1 = zeros_tile(N, E0, E1)
    dv0, dv1 = zeros_tile(N, E0, E1)
    return k0, k1, v0, v1, dk0, dk1, dv0, dv1


@triton.jit
def _chunk_step(
    k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, dq0, dq1, bias, lse, delta, rows, begin, scale_log2,
    bias_length, length, E1: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_keys_step for one chunk of N keys, and what the chunk gives to dQ^T [E, M] = K^T dS."""
    cols = begin + tl.arange(0, N)
    dk0, dk1, dv0, dv1, d_logits = _keys_step(
        k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, lse, delta, rows, cols, scale_log2,
        bias_length, length, E1, MASK, PRECISION,
    )  # fmt: skip
    dq0 = tl.dot(tl.trans(k0), d_logits, dq0, input_precision=PRECISION)
    if E1 > 0:
        dq1 = tl.dot(tl.trans(k1), d_logits, dq1, input_precision=PRECISION)
    else:
        dq1 = dq0
    return dk0, dk1, dv0, dv1, dq0, dq1


@triton.jit
def _store_chunk(
    d_keys, dk0, dk1, dv0, dv1, scale, begin, length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    cols = begin + tl.arange(0, N)
    store_tile(d_keys, dk0 * scale, dk1 * scale, cols, 3 * H * E, length, E, E0, E1)
    store_tile(d_keys + H * E, dv0, dv1, cols, 3 * H * E, length, E, E0, E1)


@triton.jit(do_not_specialize=["seqlen", "T"])
def _one_pass_kernel(
    d_out, qkv, out, bias, cu_seqlens, lse, delta, d_qkv, scale, seqlen, T, bias_b, bias_h, bias_length,
    H: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr,
    M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All of one head: every tensor is read once, and dK, dV of all keys (chunks N0 + N1 + N2) stay in registers.

    delta is written only where the bias gradient will want it.
    """
    PACKED: tl.constexpr = cu_seqlens is not None
    _block, head, sequence, start, length = locate(cu_seqlens, seqlen, 1, H)
    if length == 0:
        return
    queries = qkv + start * 3 * H * E + head * E
    d_queries = d_qkv + start * 3 * H * E + head * E
    keys = queries + H * E
    d_keys = d_queries + H * E
    outs = start * H * E + head * E
    sums = head.to(tl.int64) * T + start
    matrix = bias
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    scale_log2 = scale * LOG2E
    MASK0: tl.constexpr = PACKED or N1 == 0
    MASK1: tl.constexpr = PACKED or N2 == 0
    ka0, ka1, va0, va1, dka0, dka1, dva0, dva1 = _load_chunk(keys, 0, length, H, E, E0, E1, N0)
    if N1 > 0:
        kb0, kb1, vb0, vb1, dkb0, dkb1, dvb0, dvb1 = _load_chunk(keys, N0, length, H, E, E0, E1, N1)
    if N2 > 0:
        kc0, kc1, vc0, vc1, dkc0, dkc1, dvc0, dvc1 = _load_chunk(keys, N0 + N1, length, H, E, E0, E1, N2)
    for begin in range(0, length, M):
        rows = begin + tl.arange(0, M)
        q0, q1 = load_tile(queries, rows, 3 * H * E, length, E, E0, E1, True)
        g0, g1 = load_tile(d_out + outs, rows, H * E, length, E, E0, E1, True)
        o0, o1 = load_tile(out + outs, rows, H * E, length, E, E0, E1, True)
        row_delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), axis=1)
        if E1 > 0:
            row_delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), axis=1)
        if delta is not None:
            tl.store(delta + sums + rows, row_delta, mask=rows < length)
        row_lse = load_lse(lse + sums, rows, length)
        dq0 = tl.zeros([E0, M], tl.float32)
        if E1 > 0:
            dq1 = tl.zeros([E1, M], tl.float32)
        else:
            dq1 = dq0
        dka0, dka1, dva0, dva1, dq0, dq1 = _chunk_step(
            ka0, ka1, va0, va1, q0, q1, g0, g1, dka0, dka1, dva0, dva1, dq0, dq1, matrix, row_lse, row_delta, rows, 0,
            scale_log2, bias_length, length, E1, N0, MASK0, PRECISION,
        )  # fmt: skip
        if N1 > 0:
            dkb0, dkb1, dvb0, dvb1, dq0, dq1 = _chunk_step(
                kb0, kb1, vb0, vb1, q0, q1, g0, g1, dkb0, dkb1, dvb0, dvb1, dq0, dq1, matrix, row_lse, row_delta, rows,
                N0, scale_log2, bias_length, length, E1, N1, MASK1, PRECISION,
            )  # fmt: skip
        if N2 > 0:
            dkc0, dkc1, dvc0, dvc1, dq0, dq1 = _chunk_step(
                kc0, kc1, vc0, vc1, q0, q1, g0, g1, dkc0, dkc1, dvc0, dvc1, dq0, dq1, matrix, row_lse, row_delta, rows,
                N0 + N1, scale_log2, bias_length, length, E1, N2, True, PRECISION,
            )  # fmt: skip
        store_tile(d_queries, tl.trans(dq0) * scale, tl.trans(dq1) * scale, rows, 3 * H * E, length, E, E0, E1)
    _store_chunk(d_keys, dka0, dka1, dva0, dva1, scale, 0, length, H, E, E0, E1, N0)
    if N1 > 0:
        _store_chunk(d_keys, dkb0, dkb1, dvb0, dvb1, scale, N0, length, H, E, E0, E1, N1)
    if N2 > 0:
        _store_chunk(d_keys, dkc0, dkc1, dvc0, dvc1, scale, N0 + N1, length, H, E, E0, E1, N2)


@device.launcher
def attention_backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    seqlen: int,
    d_qkv: torch.Tensor,
    d_bias: torch.Tensor | None,
) -> None:
    """d_qkv [T, 3, H, E] and d_bias (fp32, the bias's own shape) from d_out [T, H, E]; arguments as in
    attention_forward."""
    T, _, H, E = qkv.shape
    if padding is not None:
        raise NotImplementedError("key padding: the next commit")
    if seqlen:
        cu_seqlens, max_seqlen = None, seqlen
    if d_bias is not None and (T == 0 or max_seqlen == 0):
        d_bias.zero_()
    if T == 0 or max_seqlen == 0:
        return
    sequences = count_sequences(T, cu_seqlens, seqlen)
    E0, E1 = split_head_dim(E)
    precision = device.dot_precision(qkv.dtype)
    arch = device.device_properties(qkv.device).arch
    config = attention_backward_config(max_seqlen, E, qkv.dtype, precision, arch, bias is not None)
    shape = (*bias_strides(bias), H, E, E0, E1)
    if config.chunks:
        delta = None if d_bias is None else torch.empty_like(lse)
        _one_pass_kernel[(H * sequences,)](
            d_out, qkv, out, bias, cu_seqlens, lse, delta, d_qkv, scale, seqlen, T, *shape,
            config.step, *config.chunks, precision, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        _delta_kernel[(triton.cdiv(T, DELTA_ROWS), H)](out, d_out, delta, T, H, E, E0, E1, DELTA_ROWS)
        # A program's own keys and its steps of queries for dK and dV, its own queries and steps of keys for dQ.
        for kernel in (_keys_kernel, _queries_kernel):
            blocks = triton.cdiv(max_seqlen, config.own)
            kernel[(blocks * H * sequences,)](
                d_out, qkv, bias, cu_seqlens, lse, delta, d_qkv, scale, seqlen, T, blocks, *shape,
                config.own, config.step, tail_size(config.step, seqlen, qkv.dtype), precision,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    if d_bias is not None:
        attention_bias_gradient(d_out, qkv, lse, delta, scale, bias, cu_seqlens, seqlen, d_bias)
