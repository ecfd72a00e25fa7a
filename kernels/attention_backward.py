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
from .attention_forward import as_bytes, bias_strides, count_sequences
from .attention_heads import (
    HeadOptions,
    gradient_partials,
    load_heads,
    shift_tables,
    store_heads,
    sum_gradients,
)
from .attention_tiles import (
    LOG2E,
    accumulate,
    bias_matrix,
    finish_logits,
    load_lse,
    load_row_sums,
    load_tile,
    locate,
    multiply,
    padding_row,
    row_dots,
    store_tile,
    zeros_tile,
)
from .configs import attention_backward_config, delta_rows, tail_size


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(out, d_out, delta, T, H: tl.constexpr, VO: tl.constexpr, R: tl.constexpr):
    """delta [H, T] = sum over E of out * d_out, R rows of one head per program."""
    E: tl.constexpr = VO[0]
    head = tl.program_id(1)
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    o0, o1 = load_tile(out + head * E, rows, H * E, T, VO, True)
    g0, g1 = load_tile(d_out + head * E, rows, H * E, T, VO, True)
    tl.store(delta + head.to(tl.int64) * T + rows, row_dots(o0, o1, g0, g1, VO), mask=rows < T)


@triton.jit
def _keys_step(
    k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, padding, lse, delta, rows, cols, first_row, first_col,
    scale_log2, bias_length, length,
    QK: tl.constexpr, VO: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what queries q [M, E] with output gradient g [M, E] give to dK and dV [N, E]; returns dS [N, M] as well.

    Under MASK keys past the end get weight 0, not exp2(-lse), which can be infinite.
    """
    logits = finish_logits(
        multiply(k0, k1, q0, q1, QK, PRECISION), bias, padding, rows[None, :], cols[:, None], first_row, first_col,
        scale_log2, bias_length, length, MASK,
    )  # fmt: skip
    weights = tl.exp2(logits - lse[None, :])
    dv0, dv1 = accumulate(dv0, dv1, weights, g0, g1, VO, PRECISION)
    d_weights = multiply(v0, v1, g0, g1, VO, PRECISION)
    d_logits = (weights * (d_weights - delta[None, :])).to(q0.dtype)
    dk0, dk1 = accumulate(dk0, dk1, d_logits, q0, q1, QK, PRECISION)
    return dk0, dk1, dv0, dv1, d_logits


@triton.jit
def _keys_from_queries(
    k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, rope, q_norm, bias, padding, lse, delta, begin, cols,
    first_col, scale_log2, bias_length, length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr, Q_NORM: tl.constexpr, M: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = VO[0]
    rows = begin + tl.arange(0, M)
    q0, q1 = load_heads(queries, rows, 3 * H * E, length, rope, q_norm, QK, COLUMNS, Q_NORM, MASK)
    g0, g1 = load_tile(gradients, rows, H * E, length, VO, MASK)
    row_lse, row_delta = load_row_sums(lse, delta, rows, length)
    dk0, dk1, dv0, dv1, _d_logits = _keys_step(
        k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, padding, row_lse, row_delta, rows, cols, begin,
        first_col, scale_log2, bias_length, length, QK, VO, False, PRECISION,
    )  # fmt: skip
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["seqlen", "T", "blocks", "prefix"])
def _keys_kernel(
    d_out, qkv, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, lse, delta, d_qkv, partials, scale, seqlen,
    T, blocks, bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    N: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of N keys, looping over all queries. Keys past the end only reach their own rows, not stored."""
    E: tl.constexpr = VO[0]
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * N >= length:
        return
    queries = qkv + start * 3 * H * E + head * E
    gradients = d_out + start * H * E + head * E
    sums = head.to(tl.int64) * T + start
    matrix, hidden = bias, padding
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    if padding is not None:
        hidden = padding_row(padding, sequence, seqlen)
    rope = (cos, sin, prefix)
    if cos is not None:
        rope = shift_tables(cos, sin, start, prefix, COLUMNS, cu_seqlens is not None)
    first = block * N
    cols = first + tl.arange(0, N)
    k0, k1 = load_heads(queries + H * E, cols, 3 * H * E, length, rope, k_norm, QK, COLUMNS, K_NORM, True)
    v0, v1 = load_tile(queries + 2 * H * E, cols, 3 * H * E, length, VO, True)
    dk0, dk1 = zeros_tile(N, QK)
    dv0, dv1 = zeros_tile(N, VO)
    scale_log2 = scale * LOG2E
    whole = length // M * M
    for begin in range(0, whole, M):
        dk0, dk1, dv0, dv1 = _keys_from_queries(
            k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, rope, q_norm, matrix, hidden, lse + sums,
            delta + sums, begin, cols, first, scale_log2, bias_length, length,
            H, QK, VO, COLUMNS, Q_NORM, M, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        for begin in tl.range(whole, length, TAIL, num_stages=1):
            dk0, dk1, dv0, dv1 = _keys_from_queries(
                k0, k1, v0, v1, dk0, dk1, dv0, dv1, queries, gradients, rope, q_norm, matrix, hidden, lse + sums,
                delta + sums, begin, cols, first, scale_log2, bias_length, length,
                H, QK, VO, COLUMNS, Q_NORM, TAIL, True, PRECISION,
            )  # fmt: skip
    target = d_qkv + start * 3 * H * E + head * E
    store_tile(target + 2 * H * E, dv0, dv1, cols, 3 * H * E, length, VO)
    store_heads(
        target + H * E, dk0 * scale, dk1 * scale, queries + H * E, cols, 3 * H * E, length, rope, k_norm, partials,
        tl.program_id(0), tl.num_programs(0), QK, COLUMNS, K_NORM,
    )  # fmt: skip


@triton.jit
def _queries_step(
    q0, q1, g0, g1, dq0, dq1, keys, values, rope, k_norm, bias, padding, lse, delta, rows, first, begin, scale_log2,
    bias_length, length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr, K_NORM: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what N keys give to dQ [M, E]; tiles are [M, N] here."""
    E: tl.constexpr = VO[0]
    cols = begin + tl.arange(0, N)
    k0, k1 = load_heads(keys, cols, 3 * H * E, length, rope, k_norm, QK, COLUMNS, K_NORM, MASK)
    v0, v1 = load_tile(values, cols, 3 * H * E, length, VO, MASK)
    logits = finish_logits(
        multiply(q0, q1, k0, k1, QK, PRECISION), bias, padding, rows[:, None], cols[None, :], first, begin, scale_log2,
        bias_length, length, MASK,
    )  # fmt: skip
    weights = tl.exp2(logits - lse[:, None])
    d_logits = weights * (multiply(g0, g1, v0, v1, VO, PRECISION) - delta[:, None])
    return accumulate(dq0, dq1, d_logits, k0, k1, QK, PRECISION)


@triton.jit(do_not_specialize=["seqlen", "T", "blocks", "prefix"])
def _queries_kernel(
    d_out, qkv, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, lse, delta, d_qkv, partials, scale, seqlen,
    T, blocks, bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of M queries, looping over all keys."""
    E: tl.constexpr = VO[0]
    block, head, sequence, start, length = locate(cu_seqlens, seqlen, blocks, H)
    if block * M >= length:
        return
    base = qkv + start * 3 * H * E + head * E
    sums = head.to(tl.int64) * T + start
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
    q0, q1 = load_heads(base, rows, 3 * H * E, length, rope, q_norm, QK, COLUMNS, Q_NORM, True)
    g0, g1 = load_tile(d_out + start * H * E + head * E, rows, H * E, length, VO, True)
    row_lse, row_delta = load_row_sums(lse + sums, delta + sums, rows, length)
    dq0, dq1 = zeros_tile(M, QK)
    scale_log2 = scale * LOG2E
    whole = length // N * N
    for begin in range(0, whole, N):
        dq0, dq1 = _queries_step(
            q0, q1, g0, g1, dq0, dq1, base + H * E, base + 2 * H * E, rope, k_norm, matrix, hidden, row_lse, row_delta,
            rows, first, begin, scale_log2, bias_length, length, H, QK, VO, COLUMNS, K_NORM, N, False, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        for begin in tl.range(whole, length, TAIL, num_stages=1):
            dq0, dq1 = _queries_step(
                q0, q1, g0, g1, dq0, dq1, base + H * E, base + 2 * H * E, rope, k_norm, matrix, hidden, row_lse,
                row_delta, rows, first, begin, scale_log2, bias_length, length,
                H, QK, VO, COLUMNS, K_NORM, TAIL, True, PRECISION,
            )  # fmt: skip
    target = d_qkv + start * 3 * H * E + head * E
    store_heads(
        target, dq0 * scale, dq1 * scale, base, rows, 3 * H * E, length, rope, q_norm, partials,
        tl.program_id(0), tl.num_programs(0), QK, COLUMNS, Q_NORM,
    )  # fmt: skip


@triton.jit
def _load_chunk(
    keys, begin, length, rope, k_norm,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr, K_NORM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """K and V of N keys, and zeros for their gradients."""
    E: tl.constexpr = VO[0]
    cols = begin + tl.arange(0, N)
    k0, k1 = load_heads(keys, cols, 3 * H * E, length, rope, k_norm, QK, COLUMNS, K_NORM, True)
    v0, v1 = load_tile(keys + H * E, cols, 3 * H * E, length, VO, True)
    dk0, dk1 = zeros_tile(N, QK)
    dv0, dv1 = zeros_tile(N, VO)
    return k0, k1, v0, v1, dk0, dk1, dv0, dv1


@triton.jit
def _chunk_step(
    k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, dq0, dq1, bias, padding, lse, delta, rows, first, begin,
    scale_log2, bias_length, length,
    QK: tl.constexpr, VO: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """_keys_step for one chunk of N keys, and what the chunk gives to dQ^T [E, M] = K^T dS."""
    cols = begin + tl.arange(0, N)
    dk0, dk1, dv0, dv1, d_logits = _keys_step(
        k0, k1, v0, v1, q0, q1, g0, g1, dk0, dk1, dv0, dv1, bias, padding, lse, delta, rows, cols, first, begin,
        scale_log2, bias_length, length, QK, VO, MASK, PRECISION,
    )  # fmt: skip
    dq0 = tl.dot(tl.trans(k0), d_logits, dq0, input_precision=PRECISION)
    if QK[2] > 0:
        dq1 = tl.dot(tl.trans(k1), d_logits, dq1, input_precision=PRECISION)
    else:
        dq1 = dq0
    return dk0, dk1, dv0, dv1, dq0, dq1


@triton.jit
def _store_chunk(
    d_keys, keys, dk0, dk1, dv0, dv1, scale, begin, length, rope, k_norm, partials, part, parts,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr, K_NORM: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = VO[0]
    cols = begin + tl.arange(0, N)
    store_tile(d_keys + H * E, dv0, dv1, cols, 3 * H * E, length, VO)
    store_heads(
        d_keys, dk0 * scale, dk1 * scale, keys, cols, 3 * H * E, length, rope, k_norm, partials, part, parts,
        QK, COLUMNS, K_NORM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["seqlen", "T", "steps", "prefix"])
def _one_pass_kernel(
    d_out, qkv, out, bias, padding, cu_seqlens, cos, sin, q_norm, k_norm, prefix, lse, delta, d_qkv,
    q_partials, k_partials, scale, seqlen, T, steps, bias_b, bias_h, bias_length,
    H: tl.constexpr, QK: tl.constexpr, VO: tl.constexpr, COLUMNS: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All of one head: every tensor is read once, and dK, dV of all keys (chunks N0 + N1 + N2) stay in registers.

    delta is written only where the bias gradient will want it. A program has `steps` rows of q's partial sums and one for
    each chunk of k's.
    """
    PACKED: tl.constexpr = cu_seqlens is not None
    E: tl.constexpr = VO[0]
    QK0: tl.constexpr = QK[1]
    QK1: tl.constexpr = QK[2]
    _block, head, sequence, start, length = locate(cu_seqlens, seqlen, 1, H)
    if length == 0:
        return
    queries = qkv + start * 3 * H * E + head * E
    d_queries = d_qkv + start * 3 * H * E + head * E
    keys = queries + H * E
    d_keys = d_queries + H * E
    outs = start * H * E + head * E
    sums = head.to(tl.int64) * T + start
    matrix, hidden = bias, padding
    if bias is not None:
        matrix = bias_matrix(bias, sequence, head, bias_b, bias_h)
    if padding is not None:
        hidden = padding_row(padding, sequence, seqlen)
    rope = (cos, sin, prefix)
    if cos is not None:
        rope = shift_tables(cos, sin, start, prefix, COLUMNS, PACKED)
    scale_log2 = scale * LOG2E
    CHUNKS: tl.constexpr = 1 + (N1 > 0) + (N2 > 0)
    part = tl.program_id(0)
    parts = tl.num_programs(0)
    MASK0: tl.constexpr = PACKED or N1 == 0
    MASK1: tl.constexpr = PACKED or N2 == 0
    ka0, ka1, va0, va1, dka0, dka1, dva0, dva1 = _load_chunk(
        keys, 0, length, rope, k_norm, H, QK, VO, COLUMNS, K_NORM, N0
    )
    if N1 > 0:
        kb0, kb1, vb0, vb1, dkb0, dkb1, dvb0, dvb1 = _load_chunk(
            keys, N0, length, rope, k_norm, H, QK, VO, COLUMNS, K_NORM, N1
        )
    if N2 > 0:
        kc0, kc1, vc0, vc1, dkc0, dkc1, dvc0, dvc1 = _load_chunk(
            keys, N0 + N1, length, rope, k_norm, H, QK, VO, COLUMNS, K_NORM, N2
        )
    for begin in range(0, length, M):
        rows = begin + tl.arange(0, M)
        q0, q1 = load_heads(queries, rows, 3 * H * E, length, rope, q_norm, QK, COLUMNS, Q_NORM, True)
        g0, g1 = load_tile(d_out + outs, rows, H * E, length, VO, True)
        o0, o1 = load_tile(out + outs, rows, H * E, length, VO, True)
        row_delta = row_dots(o0, o1, g0, g1, VO)
        if delta is not None:
            tl.store(delta + sums + rows, row_delta, mask=rows < length)
        row_lse = load_lse(lse + sums, rows, length)
        dq0 = tl.zeros([QK0, M], tl.float32)
        if QK1 > 0:
            dq1 = tl.zeros([QK1, M], tl.float32)
        else:
            dq1 = dq0
        dka0, dka1, dva0, dva1, dq0, dq1 = _chunk_step(
            ka0, ka1, va0, va1, q0, q1, g0, g1, dka0, dka1, dva0, dva1, dq0, dq1, matrix, hidden, row_lse, row_delta,
            rows, begin, 0, scale_log2, bias_length, length, QK, VO, N0, MASK0, PRECISION,
        )  # fmt: skip
        if N1 > 0:
            dkb0, dkb1, dvb0, dvb1, dq0, dq1 = _chunk_step(
                kb0, kb1, vb0, vb1, q0, q1, g0, g1, dkb0, dkb1, dvb0, dvb1, dq0, dq1, matrix, hidden, row_lse,
                row_delta, rows, begin, N0, scale_log2, bias_length, length, QK, VO, N1, MASK1, PRECISION,
            )  # fmt: skip
        if N2 > 0:
            dkc0, dkc1, dvc0, dvc1, dq0, dq1 = _chunk_step(
                kc0, kc1, vc0, vc1, q0, q1, g0, g1, dkc0, dkc1, dvc0, dvc1, dq0, dq1, matrix, hidden, row_lse,
                row_delta, rows, begin, N0 + N1, scale_log2, bias_length, length, QK, VO, N2, True, PRECISION,
            )  # fmt: skip
        store_heads(
            d_queries, tl.trans(dq0) * scale, tl.trans(dq1) * scale, queries, rows, 3 * H * E, length, rope, q_norm,
            q_partials, part * steps + begin // M, parts * steps, QK, COLUMNS, Q_NORM,
        )  # fmt: skip
    part *= CHUNKS
    parts *= CHUNKS
    _store_chunk(
        d_keys, keys, dka0, dka1, dva0, dva1, scale, 0, length, rope, k_norm, k_partials, part, parts,
        H, QK, VO, COLUMNS, K_NORM, N0,
    )  # fmt: skip
    if N1 > 0:
        _store_chunk(
            d_keys, keys, dkb0, dkb1, dvb0, dvb1, scale, N0, length, rope, k_norm, k_partials, part + 1, parts,
            H, QK, VO, COLUMNS, K_NORM, N1,
        )  # fmt: skip
    if N2 > 0:
        _store_chunk(
            d_keys, keys, dkc0, dkc1, dvc0, dvc1, scale, N0 + N1, length, rope, k_norm, k_partials, part + 2, parts,
            H, QK, VO, COLUMNS, K_NORM, N2,
        )  # fmt: skip


@device.launcher
def attention_backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    padding: torch.Tensor | None,
    options: HeadOptions,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    seqlen: int,
    d_qkv: torch.Tensor,
    d_bias: torch.Tensor | None,
    d_q_norm: torch.Tensor | None,
    d_k_norm: torch.Tensor | None,
) -> None:
    """d_qkv [T, 3, H, E] and d_bias (fp32, the bias's own shape) from d_out [T, H, E]; d_q_norm and d_k_norm [2, E] fp32:
    the gradients of the head norms' weight and bias. Arguments as in attention_forward."""
    T, _, H, E = qkv.shape
    if seqlen:
        cu_seqlens, max_seqlen = None, seqlen
    if T == 0 or max_seqlen == 0:
        for gradient in (d_bias, d_q_norm, d_k_norm):
            if gradient is not None:
                gradient.zero_()
        return
    sequences = count_sequences(T, cu_seqlens, seqlen)
    precision = device.dot_precision(qkv.dtype)
    arch = device.device_properties(qkv.device).arch
    config = attention_backward_config(
        max_seqlen, E, qkv.dtype, precision, arch, bias is not None or padding is not None, options.active
    )
    hidden = as_bytes(padding)
    heads = options.arguments(seqlen)
    shape = (*bias_strides(bias), H, *options.constants(E))
    if config.chunks:
        delta = None if d_bias is None else torch.empty_like(lse)
        programs, steps = H * sequences, triton.cdiv(max_seqlen, config.step)
        q_partials = gradient_partials(d_q_norm, programs * steps)
        k_partials = gradient_partials(d_k_norm, programs * sum(chunk > 0 for chunk in config.chunks))
        _one_pass_kernel[(programs,)](
            d_out, qkv, out, bias, hidden, cu_seqlens, *heads, lse, delta, d_qkv, q_partials, k_partials, scale, seqlen,
            T, steps, *shape, config.step, *config.chunks, precision, num_warps=config.warps, num_stages=config.stages,
            enable_fp_fusion=True,
            maxnreg=config.registers,
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        rows = delta_rows(E)
        _delta_kernel[(triton.cdiv(T, rows), H)](
            out, d_out, delta, T, H, options.pieces(E)[1], rows, enable_fp_fusion=True
        )
        programs = triton.cdiv(max_seqlen, config.own) * H * sequences
        q_partials, k_partials = gradient_partials(d_q_norm, programs), gradient_partials(d_k_norm, programs)
        # A program's own keys and its steps of queries for dK and dV, its own queries and steps of keys for dQ.
        for kernel, partials in ((_keys_kernel, k_partials), (_queries_kernel, q_partials)):
            kernel[(programs,)](
                d_out, qkv, bias, hidden, cu_seqlens, *heads, lse, delta, d_qkv, partials, scale, seqlen,
                T, triton.cdiv(max_seqlen, config.own), *shape,
                config.own, config.step, tail_size(config.step, seqlen, qkv.dtype), precision,
                num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
                enable_fp_fusion=True,
            )  # fmt: skip
    sum_gradients(q_partials, d_q_norm)
    sum_gradients(k_partials, d_k_norm)
    if d_bias is not None:
        attention_bias_gradient(d_out, qkv, lse, delta, scale, bias, hidden, options, cu_seqlens, seqlen, d_bias)
