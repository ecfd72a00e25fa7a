"""What the attention kernels share: where a program's tile lies, loading and storing it, and its logits.

Legend: B sequences, L tokens of one sequence, T = tokens of all sequences, H heads, E head dim. A head dim is cut into
two power-of-two pieces E0 + E1 (72 = 64 + 16, of which 8 are masked), because tl.arange takes powers of two only and
padding 72 to 128 would waste 44 % of every product. E1 = 0 means one piece; its variables then repeat the first piece's
and are never used. Logits are in units of log2, so that the exponential is the hardware's exp2. Row offsets are int64:
tokens times 3 * H * E can pass 2**31.
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
def load_piece(
    base, rows, stride, length, E: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr
):
    """Columns FROM .. FROM + WIDTH of the given rows [R, WIDTH]; MASK where rows can pass the sequence's end."""
    cols = FROM + tl.arange(0, WIDTH)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASK and FROM + WIDTH > E:
        return tl.load(base + at, mask=(rows < length)[:, None] & (cols < E)[None, :], other=0.0)
    elif MASK:
        return tl.load(base + at, mask=(rows < length)[:, None], other=0.0)
    elif FROM + WIDTH > E:
        return tl.load(base + at, mask=(cols < E)[None, :], other=0.0)
    else:
        return tl.load(base + at)


@triton.jit
def load_tile(
    base, rows, stride, length,
    E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    piece0 = load_piece(base, rows, stride, length, E, 0, E0, MASK)
    if E1 > 0:
        piece1 = load_piece(base, rows, stride, length, E, E0, E1, MASK)
    else:
        piece1 = piece0
    return piece0, piece1


@triton.jit
def store_tile(base, piece0, piece1, rows, stride, length, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    cols = tl.arange(0, E0)
    at = rows.to(tl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < length)[:, None] & (cols < E)[None, :]
    tl.store(base + at, piece0.to(base.dtype.element_ty), mask=mask)
    if E1 > 0:
        more = E0 + tl.arange(0, E1)
        at1 = rows.to(tl.int64)[:, None] * stride + more[None, :]
        mask1 = (rows < length)[:, None] & (more < E)[None, :]
        tl.store(base + at1, piece1.to(base.dtype.element_ty), mask=mask1)


@triton.jit
def multiply(a0, a1, b0, b1, E1: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b.T [R, S] over the head dim, for a [R, E] and b [S, E] in pieces."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if E1 > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def accumulate(sum0, sum1, weights, b0, b1, E1: tl.constexpr, PRECISION: tl.constexpr):
    """sum [R, E] += weights [R, S] @ b [S, E]."""
    weights = weights.to(b0.dtype)
    sum0 = tl.dot(weights, b0, sum0, input_precision=PRECISION)
    if E1 > 0:
        sum1 = tl.dot(weights, b1, sum1, input_precision=PRECISION)
    else:
        sum1 = sum0
    return sum0, sum1


@triton.jit
def zeros_tile(ROWS: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    sum0 = tl.zeros([ROWS, E0], tl.float32)
    if E1 > 0:
        sum1 = tl.zeros([ROWS, E1], tl.float32)
    else:
        sum1 = sum0
    return sum0, sum1


@triton.jit
def bias_matrix(bias, sequence, head, stride_b, stride_h):
    """The [L, L] matrix of one sequence and head; strides of broadcast dimensions are 0."""
    return bias + sequence.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h


@triton.jit
def add_bias(logits, bias, queries, keys, bias_length, length):
    """logits (log2 units) + bias, for queries and keys shaped to broadcast to the tile ([R, 1], [1, S] or swapped).

    Offsets inside one [L, L] matrix are int32, which holds to L = 46340 (8 GB of fp32): rows of odd length load one
    number per pointer, and 64-bit pointers of a whole tile would spill.
    """
    if bias is None:
        return logits
    else:
        at = queries * bias_length + keys
        value = tl.load(bias + at, mask=(queries < length) & (keys < length), other=0.0)
        return tl.fma(value.to(tl.float32), tl.full(logits.shape, LOG2E, tl.float32), logits)


@triton.jit
def load_lse(lse, rows, length):
    """lse of the given queries in log2 units. Where a row has no key (lse -inf) or does not exist, +inf makes each of
    its weights exp2(-inf) = 0."""
    natural = tl.load(lse + rows, mask=rows < length, other=float("inf"))
    return tl.where(natural == float("-inf"), float("inf"), natural) * LOG2E


@triton.jit
def load_row_sums(lse, delta, rows, length):
    return load_lse(lse, rows, length), tl.load(delta + rows, mask=rows < length, other=0.0)
