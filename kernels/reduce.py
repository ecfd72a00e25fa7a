"""Second stage of every column sum: partial sums [K, G, D] added over G in a fixed order, so that results repeat.

Legend: K sums taken together, G partial sums of each, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 32 columns are one 128-byte line of fp32; 64 rows keep 16 loads per thread in flight.
COLUMNS = 32
ROWS = 64


@triton.jit(do_not_specialize=["G"])
def _sum_partials_kernel(partials, out0, out1, out2, G, D, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    which = tl.program_id(1)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_G)
    column_mask = cols < D
    source = partials + which * G.to(tl.int64) * D + cols[None, :]
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, G, BLOCK_G):
        at = start + rows
        mask = (at < G)[:, None] & column_mask[None, :]
        total += tl.load(source + at.to(tl.int64)[:, None] * D, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(out0 + cols, result, mask=column_mask)
    elif which == 1:
        if out1 is not None:
            tl.store(out1 + cols, result, mask=column_mask)
    else:
        if out2 is not None:
            tl.store(out2 + cols, result, mask=column_mask)


def sum_partials(partials: torch.Tensor, *outs: torch.Tensor) -> None:
    """outs[k][D] = partials[k].sum(0) for partials [K, G, D] fp32; K = len(outs) is at most 3."""
    K, G, D = partials.shape
    padded = (*outs, None, None)
    grid = (triton.cdiv(D, COLUMNS), K)
    _sum_partials_kernel[grid](
        partials, padded[0], padded[1], padded[2], G, D, ROWS, COLUMNS, num_warps=4, enable_fp_fusion=True
    )


def sum_many_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out [K, D] = partials [K, G, D].sum(1), K at most 3, for a large G: in two stages, so that a few columns still make
    enough programs."""
    K, G, D = partials.shape
    first = 1 << max(0, (G.bit_length() - 1) // 2)  # about sqrt(G)
    if G > 4 * ROWS:
        padded = -(-G // first) * first
        if padded != G:
            partials = torch.cat([partials, partials.new_zeros(K, padded - G, D)], 1)
        sums = partials.new_empty(K, padded // first * D)
        sum_partials(partials.view(K, first, -1), *sums)
        partials = sums.view(K, -1, D)
    sum_partials(partials, *out)
