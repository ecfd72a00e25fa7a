"""What the attention kernels share: where a program's tile lies, loading and storing it, and its logits.

Legend: B sequences, L tokens of one sequence, T = tokens of all sequences, H heads, E head dim. A head dim is cut into
two power-of-two pieces E0 + E1 (72 = 64 + 16, of which 8 are masked), because tl.arange takes powers of two only and
padding 72 to 128 would waste 44 % of every product. E1 = 0 means one piece; its variables then repeat the first piece's
and are never used. With rotary embedding the pieces of q and k are instead what turns together: the two halves (PAIRS 1)
or the even and the odd columns (PAIRS 2), each padded to a power of two. HEAD is (E, E0, E1, PAIRS), VO v's and out's,
QK q's and k's. Logits are in units of log2, so that the exponential is the hardware's exp2. Row offsets are int64: tokens
times 3 * H * E can pass 2**31.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def extent(cu_seqlens, seqlen, sequence):
    """First row (int64) and length of a sequence."""
    if cu_seqlens is None:
        start = sequence.to(tl.int64) * seqlen
        length = seqlen
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return start, length


@triton.jit
def locate(cu_seqlens, seqlen, blocks, H: tl.constexpr):
    """Block, head, sequence, first row (int64) and length of this program; blocks run fastest, so a head's K and V stay
    in L2."""
    program = tl.program_id(0)
    block = program % blocks
    head = (program // blocks) % H
    sequence = (program // blocks) // H
    start, length = extent(cu_seqlens, seqlen, sequence)
    return block, head, sequence, start, length


@triton.jit
def offsets_of(rows, stride, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """int64 offsets [R, WIDTH] of columns FROM .. FROM + WIDTH of the given rows."""
    return rows.to(tl.int64)[:, None] * stride + (FROM + tl.arange(0, WIDTH))[None, :]


@triton.jit
def load_piece(
    base, rows, stride, length, VALID: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr
):
    """Columns FROM .. FROM + WIDTH of the given rows [R, WIDTH], of which the first VALID exist; MASK where rows can pass
    the sequence's end."""
    local = tl.arange(0, WIDTH)
    at = offsets_of(rows, stride, FROM, WIDTH)
    if MASK and VALID < WIDTH:
        return tl.load(base + at, mask=(rows < length)[:, None] & (local < VALID)[None, :], other=0.0)
    elif MASK:
        return tl.load(base + at, mask=(rows < length)[:, None], other=0.0)
    elif VALID < WIDTH:
        return tl.load(base + at, mask=(local < VALID)[None, :], other=0.0)
    else:
        return tl.load(base + at)


@triton.jit
def store_piece(base, piece, rows, stride, length, VALID: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    local = tl.arange(0, WIDTH)
    at = offsets_of(rows, stride, FROM, WIDTH)
    mask = (rows < length)[:, None] & (local < VALID)[None, :]
    tl.store(base + at, piece.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(base, rows, stride, length, HEAD: tl.constexpr, MASK: tl.constexpr):
    """Both pieces of the given rows of one head."""
    E: tl.constexpr = HEAD[0]
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    PAIRS: tl.constexpr = HEAD[3]
    if PAIRS == 2:
        both = load_piece(base, rows, stride, length, E, 0, 2 * E0, MASK)
        piece0, piece1 = tl.split(tl.reshape(both, [rows.shape[0], E0, 2]))
    elif PAIRS == 1:
        piece0 = load_piece(base, rows, stride, length, E // 2, 0, E0, MASK)
        piece1 = load_piece(base, rows, stride, length, E // 2, E // 2, E1, MASK)
    else:
        piece0 = load_piece(base, rows, stride, length, E, 0, E0, MASK)
        if E1 > 0:
            piece1 = load_piece(base, rows, stride, length, E - E0, E0, E1, MASK)
        else:
            piece1 = piece0
    return piece0, piece1


@triton.jit
def store_tile(base, piece0, piece1, rows, stride, length, HEAD: tl.constexpr):
    E: tl.constexpr = HEAD[0]
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    PAIRS: tl.constexpr = HEAD[3]
    if PAIRS == 2:
        both = tl.reshape(tl.join(piece0, piece1), [rows.shape[0], 2 * E0])
        store_piece(base, both, rows, stride, length, E, 0, 2 * E0)
    elif PAIRS == 1:
        store_piece(base, piece0, rows, stride, length, E // 2, 0, E0)
        store_piece(base, piece1, rows, stride, length, E // 2, E // 2, E1)
    else:
        store_piece(base, piece0, rows, stride, length, E, 0, E0)
        if E1 > 0:
            store_piece(base, piece1, rows, stride, length, E - E0, E0, E1)


@triton.jit
def multiply(a0, a1, b0, b1, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T [R, S] over the head dim, for a [R, E] and b [S, E] in pieces."""
    E1: tl.constexpr = HEAD[2]
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if E1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(sum0, sum1, weights, b0, b1, HEAD: tl.constexpr, PRECISION: tl.constexpr):
    """sum [R, E] += weights [R, S] @ b [S, E]."""
    E1: tl.constexpr = HEAD[2]
    weights = weights.to(b0.dtype)
    sum0 = tl.dot(weights, b0, sum0, input_precision=PRECISION)
    if E1 > 0:
        sum1 = tl.dot(weights, b1, sum1, input_precision=PRECISION)
    else:
        sum1 = sum0
    return sum0, sum1


@triton.jit
def zeros_tile(ROWS: tl.constexpr, HEAD: tl.constexpr):
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    sum0 = tl.zeros([ROWS, E0], tl.float32)
    if E1 > 0:
        sum1 = tl.zeros([ROWS, E1], tl.float32)
    else:
        sum1 = sum0
    return sum0, sum1


@triton.jit
def row_dots(a0, a1, b0, b1, HEAD: tl.constexpr):
    """sum over E of a * b [R], in fp32."""
    E1: tl.constexpr = HEAD[2]
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), axis=1)
    if E1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), axis=1)
    return total


@triton.jit
def bias_matrix(bias, sequence, head, stride_b, stride_h):
    """The [L, L] matrix of one sequence and head; strides of broadcast dimensions are 0."""
    return bias + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def padding_row(padding, sequence, seqlen):
    return padding + sequence.to(tl.int64) * seqlen


@triton.jit
def bias_tile(bias, first_query, first_key, queries, keys, bias_length):
    """Pointers to the tile of a bias matrix whose first row and column are given, for queries and keys shaped to broadcast.

    Only the tile's first element is found in int64: 64-bit offsets of a whole tile would spill.
    """
    origin = tl.cast(bias_length, tl.int64) * first_query + first_key
    return bias + origin + ((queries - first_query) * bias_length + (keys - first_key))


@triton.jit
def finish_logits(
    products, bias, padding, queries, keys, first_query, first_key, scale_log2, bias_length, length, MASK: tl.constexpr
):
    """Logits in log2 units from q k^T; -inf for padding keys, and under MASK for those past the sequence's end.

    queries and keys are shaped to broadcast to the tile: [R, 1] and [1, S], or [1, R] and [S, 1].
    """
    logits = products * scale_log2
    if bias is not None:
        at = bias_tile(bias, first_query, first_key, queries, keys, bias_length)
        value = tl.load(at, mask=(queries < length) & (keys < length), other=0.0)
        logits = tl.fma(value.to(tl.float32), tl.full(logits.shape, LOG2E, tl.float32), logits)
    if padding is not None:
        visible = tl.load(padding + keys, mask=keys < length, other=1) == 0
        logits = tl.where(visible, logits, float("-inf"))
    elif MASK:
        logits = tl.where(keys < length, logits, float("-inf"))
    return logits


@triton.jit
def load_lse(lse, rows, length):
    """lse of the given queries in log2 units. Where a row has no key (lse -inf) or does not exist, +inf makes each of
    its weights exp2(-inf) = 0."""
    natural = tl.load(lse + rows, mask=rows < length, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural) * LOG2E


@triton.jit
def load_row_sums(lse, delta, rows, length):
    return load_lse(lse, rows, length), tl.load(delta + rows, mask=rows < length, other=0.0)
