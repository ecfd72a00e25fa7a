"""q and k on their way into attention: head norm, then rotary embedding, applied to each tile as it is loaded, and the way
back for its gradient. Nothing of it is ever written to memory.

Legend in attention_tiles.py. The pieces of a rotated tile hold the partners of each pair, so a rotation stays inside
registers. NORM is 0 (none), 1 (LayerNorm) or 2 (RMSNorm); `norm` its (weight, bias, eps); `rope` the tables (cos, sin,
prefix), of E or E / 2 columns, shifted so that a token's own index finds its row. Tokens before `prefix` do not turn.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention_tiles import load_tile, offsets_of, row_dots, store_tile
from .configs import next_power_of_two, split_head_dim
from .reduce import sum_many_partials


@triton.jit
def shift_tables(cos, sin, start, prefix, COLUMNS: tl.constexpr, PACKED: tl.constexpr):
    """`rope` of one sequence that starts at row `start`: a packed batch has a row for each of its rows."""
    if PACKED:
        first = start
    else:
        first = -tl.cast(prefix, tl.int64)
    return cos + first * COLUMNS, sin + first * COLUMNS, prefix


@triton.jit
def _load_table(table, rows, length, prefix, OTHER: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr):
    """The table's values [R, E0] for either piece."""
    E: tl.constexpr = HEAD[0]
    E0: tl.constexpr = HEAD[1]
    PAIRS: tl.constexpr = HEAD[3]
    WIDTH: tl.constexpr = 2 * E0 if PAIRS == 2 and COLUMNS == E else E0
    VALID: tl.constexpr = E if PAIRS == 2 and COLUMNS == E else E // 2
    local = tl.arange(0, WIDTH)
    at = table + offsets_of(rows, COLUMNS, 0, WIDTH)
    mask = ((rows >= prefix) & (rows < length))[:, None] & (local < VALID)[None, :]
    first = tl.load(at, mask=mask, other=OTHER)
    if COLUMNS < E:
        return first, first
    elif PAIRS == 2:
        return tl.split(tl.reshape(first, [rows.shape[0], E0, 2]))
    else:
        return first, tl.load(at + E // 2, mask=mask, other=OTHER)


@triton.jit
def _turn(x0, x1, rope, rows, length, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BACK: tl.constexpr):
    """Each pair (x0, x1) times exp(i * angle); BACK: the transpose of that."""
    cos, sin, prefix = rope
    cos0, cos1 = _load_table(cos, rows, length, prefix, 1.0, HEAD, COLUMNS)
    sin0, sin1 = _load_table(sin, rows, length, prefix, 0.0, HEAD, COLUMNS)
    if BACK:
        return x0 * cos0 + x1 * sin1, x1 * cos1 - x0 * sin0
    else:
        return x0 * cos0 - x1 * sin0, x1 * cos1 + x0 * sin1


@triton.jit
def _columns(WIDTH: tl.constexpr, PIECE: tl.constexpr, HEAD: tl.constexpr):
    """Which columns of the head a piece holds, and whether they exist."""
    E: tl.constexpr = HEAD[0]
    E0: tl.constexpr = HEAD[1]
    PAIRS: tl.constexpr = HEAD[3]
    local = tl.arange(0, WIDTH)
    if PAIRS == 2:
        return 2 * local + PIECE, local < E // 2
    elif PAIRS == 1:
        return local + PIECE * (E // 2), local < E // 2
    else:
        return local + PIECE * E0, local + PIECE * E0 < E


@triton.jit
def _load_vector(vector, HEAD: tl.constexpr):
    """A parameter [E] in pieces, fp32; zeros beyond."""
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    at, valid = _columns(E0, 0, HEAD)
    piece0 = tl.load(vector + at, mask=valid, other=0.0).to(tl.float32)
    if E1 > 0:
        more, there = _columns(E1, 1, HEAD)
        piece1 = tl.load(vector + more, mask=there, other=0.0).to(tl.float32)
    else:
        piece1 = piece0
    return piece0, piece1


@triton.jit
def _store_vector(vector, piece0, piece1, HEAD: tl.constexpr):
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    at, valid = _columns(E0, 0, HEAD)
    tl.store(vector + at, piece0, mask=valid)
    if E1 > 0:
        more, there = _columns(E1, 1, HEAD)
        tl.store(vector + more, piece1, mask=there)


@triton.jit
def _wide(x0, x1, HEAD: tl.constexpr):
    E1: tl.constexpr = HEAD[2]
    wide0 = x0.to(tl.float32)
    if E1 > 0:
        wide1 = x1.to(tl.float32)
    else:
        wide1 = wide0
    return wide0, wide1


@triton.jit
def _times(x0, x1, vector, HEAD: tl.constexpr):
    """x [R, E] * vector [E]; x itself where there is no vector."""
    if vector is None:
        return x0, x1
    else:
        v0, v1 = _load_vector(vector, HEAD)
        return x0 * v0[None, :], x1 * v1[None, :]


@triton.jit
def _standardise(x0, x1, eps, HEAD: tl.constexpr, NORM: tl.constexpr):
    """fp32 x [R, E], centred for LayerNorm, over its deviation; and one over that [R]. Columns beyond E stay 0."""
    E: tl.constexpr = HEAD[0]
    E0: tl.constexpr = HEAD[1]
    E1: tl.constexpr = HEAD[2]
    if NORM == 1:
        total = tl.sum(x0, axis=1)
        if E1 > 0:
            total += tl.sum(x1, axis=1)
        mean = (total / E)[:, None]
        _at, valid = _columns(E0, 0, HEAD)
        x0 = tl.where(valid[None, :], x0 - mean, 0.0)
        if E1 > 0:
            _more, there = _columns(E1, 1, HEAD)
            x1 = tl.where(there[None, :], x1 - mean, 0.0)
        else:
            x1 = x0
    rstd = tl.rsqrt(row_dots(x0, x1, x0, x1, HEAD) / E + eps)
    return x0 * rstd[:, None], x1 * rstd[:, None], rstd


@triton.jit
def load_heads(
    base, rows, stride, length, rope, norm,
    HEAD: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Rows of one head of q or k as attention sees them, in the dtype of memory."""
    PAIRS: tl.constexpr = HEAD[3]
    x0, x1 = load_tile(base, rows, stride, length, HEAD, MASK)
    if NORM > 0 or PAIRS > 0:
        y0, y1 = _wide(x0, x1, HEAD)
        if NORM > 0:
            weight, bias, eps = norm
            y0, y1, _rstd = _standardise(y0, y1, eps, HEAD, NORM)
            y0, y1 = _times(y0, y1, weight, HEAD)
            if bias is not None:
                b0, b1 = _load_vector(bias, HEAD)
                y0 += b0[None, :]
                y1 += b1[None, :]
        if PAIRS > 0:
            y0, y1 = _turn(y0, y1, rope, rows, length, HEAD, COLUMNS, False)
        return y0.to(x0.dtype), y1.to(x0.dtype)
    else:
        return x0, x1


@triton.jit
def _add_columns(partials, g0, g1, rows, length, HEAD: tl.constexpr):
    """This program's share of a parameter's gradient [E]: g summed over the rows that exist."""
    exists = (rows < length)[:, None]
    _store_vector(partials, tl.sum(tl.where(exists, g0, 0.0), axis=0), tl.sum(tl.where(exists, g1, 0.0), axis=0), HEAD)


@triton.jit
def store_heads(
    target, g0, g1, base, rows, stride, length, rope, norm, partials, part, parts,
    HEAD: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store the gradient of q or k as they are in memory (at base), from g, that of what load_heads gave, in fp32.

    partials [2, parts, E]: row `part` of weight and bias gets this tile's share of their gradients.
    """
    E: tl.constexpr = HEAD[0]
    PAIRS: tl.constexpr = HEAD[3]
    if PAIRS > 0:
        g0, g1 = _turn(g0, g1, rope, rows, length, HEAD, COLUMNS, True)
    if NORM > 0:
        weight, _bias, eps = norm
        x0, x1 = load_tile(base, rows, stride, length, HEAD, True)
        x0, x1 = _wide(x0, x1, HEAD)
        x0, x1, rstd = _standardise(x0, x1, eps, HEAD, NORM)
        if partials is not None:
            _add_columns(partials + tl.cast(part, tl.int64) * E, g0 * x0, g1 * x1, rows, length, HEAD)
            _add_columns(partials + (tl.cast(parts, tl.int64) + part) * E, g0, g1, rows, length, HEAD)
        g0, g1 = _times(g0, g1, weight, HEAD)
        slope = (row_dots(g0, g1, x0, x1, HEAD) / E)[:, None]
        if NORM == 1:
            total = tl.sum(g0, axis=1)
            if HEAD[2] > 0:
                total += tl.sum(g1, axis=1)
            mean = (total / E)[:, None]
            g0 = (g0 - x0 * slope - mean) * rstd[:, None]
            g1 = (g1 - x1 * slope - mean) * rstd[:, None]
        else:
            g0 = (g0 - x0 * slope) * rstd[:, None]
            g1 = (g1 - x1 * slope) * rstd[:, None]
    store_tile(target, g0, g1, rows, stride, length, HEAD)


class HeadOptions(NamedTuple):
    """Head norms and rotary embedding of q and k, as the launchers take them. A norm kind of "" is no norm."""

    cos: torch.Tensor | None = None  # [N, E] or [N, E / 2] fp32, N the last tokens of a sequence or all packed ones
    sin: torch.Tensor | None = None
    interleaved: bool = False
    q_norm: str = ""
    k_norm: str = ""
    q_weight: torch.Tensor | None = None
    q_bias: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    q_eps: float = 0.0
    k_eps: float = 0.0

    def pieces(self, E: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """QK and VO."""
        E0, E1 = split_head_dim(E)
        plain = (E, E0, E1, 0)
        if self.cos is None:
            return plain, plain
        half = max(16, next_power_of_two(E // 2))
        return (E, half, half, 2 if self.interleaved else 1), plain

    def arguments(self, seqlen: int) -> tuple[Any, ...]:
        """cos, sin, q's and k's (weight, bias, eps), prefix: what the kernels take at run time."""
        prefix = seqlen - self.cos.shape[0] if self.cos is not None and seqlen else 0
        q = (self.q_weight, self.q_bias, self.q_eps)
        k = (self.k_weight, self.k_bias, self.k_eps)
        return self.cos, self.sin, q, k, prefix

    def constants(self, E: int) -> tuple[Any, ...]:
        """QK, VO, COLUMNS, Q_NORM, K_NORM."""
        kinds = ("", "layer_norm", "rms_norm")
        columns = 0 if self.cos is None else self.cos.shape[1]
        return *self.pieces(E), columns, kinds.index(self.q_norm), kinds.index(self.k_norm)

    @property
    def active(self) -> bool:
        return self.cos is not None or bool(self.q_norm or self.k_norm)


def gradient_partials(wanted: torch.Tensor | None, parts: int) -> torch.Tensor | None:
    """[2, parts, E] for store_heads; zeros, as programs past the end of a short sequence write nothing."""
    return None if wanted is None else wanted.new_zeros(2, parts, wanted.shape[1])


def sum_gradients(partials: torch.Tensor | None, wanted: torch.Tensor | None) -> None:
    """wanted [2, E] = the partials' sums: the gradients of weight and bias."""
    if wanted is not None and partials is not None:
        sum_many_partials(partials, wanted)
