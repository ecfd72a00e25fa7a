"""Residual add, LayerScale, DropPath and LayerNorm in one pass over memory, forward and backward.

Legend: T rows (tokens of all images), D width, B images; row t belongs to image t // (T // B). X is the dtype of the
residual stream, Y the dtype of branch and normed. Statistics are fp32. Recomputing in backward must give the forward's
bits, so multiply-adds are spelled out with tl.fma and the compiler's own contraction, which depends on the surrounding
code, is switched off (enable_fp_fusion=False).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .configs import backward_rows, row_config
from .reduce import sum_partials


@triton.jit
def _branch_gain(scale, drop_path, rows, cols, row_mask, col_mask, rows_per_image):
    """drop_path * scale as fp32 [1 or BLOCK_T, 1 or BLOCK_D]; multiplying by an absent factor is left out."""
    gain = tl.full([1, 1], 1.0, tl.float32)
    if drop_path is not None:
        gain = gain * tl.load(drop_path + rows // rows_per_image, mask=row_mask, other=0.0)[:, None]
    if scale is not None:
        gain = gain * tl.load(scale + cols, mask=col_mask, other=0.0)[None, :]
    return gain


@triton.jit
def _add_branch(x, branch, scale, drop_path, rows, cols, at, row_mask, col_mask, rows_per_image, mask):
    gain = _branch_gain(scale, drop_path, rows, cols, row_mask, col_mask, rows_per_image)
    value = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    return tl.fma(value, tl.broadcast_to(gain, value.shape), x)


@triton.jit
def _normalise(x, mean, rstd, weight, bias, cols, col_mask):
    """(x - mean) * rstd * weight + bias for x [BLOCK_T, BLOCK_D], mean and rstd [BLOCK_T]."""
    w = tl.load(weight + cols, mask=col_mask, other=0.0)[None, :]
    b = tl.load(bias + cols, mask=col_mask, other=0.0)[None, :]
    normal = (x - mean[:, None]) * rstd[:, None]
    return tl.fma(normal, tl.broadcast_to(w, normal.shape), tl.broadcast_to(b, normal.shape))


@triton.jit
def _tile(T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, block):
    """Rows, columns, offsets and masks of one tile of whole rows; offsets in int64, as T * D can pass 2**31."""
    rows = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    row_mask = rows < T
    col_mask = cols < D
    at = rows[:, None] * D + cols[None, :]
    return rows, cols, at, row_mask, col_mask, row_mask[:, None] & col_mask[None, :]


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _forward_kernel(
    x, branch, scale, drop_path, weight, bias, total, normed, mean, rstd, T, rows_per_image, eps,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, cols, at, row_mask, col_mask, mask = _tile(T, D, BLOCK_T, BLOCK_D, tl.program_id(0))
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        value = _add_branch(value, branch, scale, drop_path, rows, cols, at, row_mask, col_mask, rows_per_image, mask)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        value = rounded.to(tl.float32)  # backward sees the stored total, so the statistics are of that one
    average = tl.sum(value, axis=1) / D
    centred = tl.where(mask, value - average[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + eps)
    tl.store(mean + rows, average, mask=row_mask)
    tl.store(rstd + rows, inverse, mask=row_mask)
    out = _normalise(value, average, inverse, weight, bias, cols, col_mask)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _apply_kernel(
    total, mean, rstd, weight, bias, normed, T, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    rows, cols, at, row_mask, col_mask, mask = _tile(T, D, BLOCK_T, BLOCK_D, tl.program_id(0))
    value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    average = tl.load(mean + rows, mask=row_mask, other=0.0)
    inverse = tl.load(rstd + rows, mask=row_mask, other=0.0)
    out = _normalise(value, average, inverse, weight, bias, cols, col_mask)
    tl.store(normed + at, out.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _scale_add_kernel(
    residual, branch, scale, drop_path, total, T, rows_per_image,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, cols, at, row_mask, col_mask, mask = _tile(T, D, BLOCK_T, BLOCK_D, tl.program_id(0))
    value = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    value = _add_branch(value, branch, scale, drop_path, rows, cols, at, row_mask, col_mask, rows_per_image, mask)
    tl.store(total + at, value.to(total.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _backward_kernel(
    d_normed, d_total, total, mean, rstd, weight, branch, scale, drop_path, d_x, d_branch, partials, T, rows_per_image,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Each program walks every G-th tile of rows and keeps its own column sums [2 or 3, G, D] in registers."""
    G = tl.num_programs(0)
    cols = tl.arange(0, BLOCK_D)
    sum_weight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    sum_bias = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    sum_scale = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), G):
        rows, cols, at, row_mask, col_mask, mask = _tile(T, D, BLOCK_T, BLOCK_D, block)
        gradient = tl.load(d_normed + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        average = tl.load(mean + rows, mask=row_mask, other=0.0)[:, None]
        inverse = tl.load(rstd + rows, mask=row_mask, other=0.0)[:, None]
        normal = (value - average) * inverse
        w = tl.load(weight + cols, mask=col_mask, other=0.0)[
            None, :
        ]  # from L1: held across rows it would spill at 8192
        sum_weight += gradient * normal
        sum_bias += gradient
        weighted = gradient * w  # 0 outside D, so the two row sums need no further mask
        along = tl.sum(weighted * normal, axis=1)[:, None] / D
        level = tl.sum(weighted, axis=1)[:, None] / D
        result = (weighted - level - normal * along) * inverse
        if d_total is not None:
            result += tl.load(d_total + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + at, result.to(d_x.dtype.element_ty), mask=mask)
        if d_branch is not None:
            gain = _branch_gain(scale, drop_path, rows, cols, row_mask, col_mask, rows_per_image)
            tl.store(d_branch + at, (result * gain).to(d_branch.dtype.element_ty), mask=mask)
        if SCALE_GRADIENT:
            added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
            if drop_path is not None:
                added = added * tl.load(drop_path + rows // rows_per_image, mask=row_mask, other=0.0)[:, None]
            sum_scale += added * result
    out = partials + tl.program_id(0) * D + cols
    tl.store(out, tl.sum(sum_weight, axis=0), mask=cols < D)
    tl.store(out + G * D, tl.sum(sum_bias, axis=0), mask=cols < D)
    if SCALE_GRADIENT:
        tl.store(out + 2 * G * D, tl.sum(sum_scale, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _scale_gradient_kernel(
    d_x, branch, drop_path, partials, T, rows_per_image, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """d_scale's column sums [G, D] on their own, for rows too wide to keep three sums in registers."""
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
        rows, _cols, at, row_mask, _col_mask, mask = _tile(T, D, BLOCK_T, BLOCK_D, block)
        added = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        if drop_path is not None:
            added = added * tl.load(drop_path + rows // rows_per_image, mask=row_mask, other=0.0)[:, None]
        total += added * tl.load(d_x + at, mask=mask, other=0.0).to(tl.float32)
    cols = tl.arange(0, BLOCK_D)
    tl.store(partials + tl.program_id(0) * D + cols, tl.sum(total, axis=0), mask=cols < D)


def _rows_per_image(T: int, drop_path: torch.Tensor | None) -> int:
    return 1 if drop_path is None else T // drop_path.shape[0]


@device.launcher
def layer_norm_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    normed: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """total [T, D] = x + drop_path * scale * branch; normed [T, D], mean [T], rstd [T] of the total as stored.

    Without a branch, total is None and x is normalised.
    """
    T, D = x.shape
    if T == 0:
        return
    config = row_config(D, x.dtype, device.device_properties(x.device).arch)
    _forward_kernel[(triton.cdiv(T, config.rows),)](
        x, branch, scale, drop_path, weight, bias, total, normed, mean, rstd, T, _rows_per_image(T, drop_path), eps,
        D, config.rows, config.width, num_warps=config.warps, maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip


@device.launcher
def layer_norm_apply(
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    normed: torch.Tensor,
) -> None:
    """normed [T, D] from saved statistics, the same bits as layer_norm_forward's."""
    T, D = total.shape
    if T == 0:
        return
    config = row_config(D, total.dtype, device.device_properties(total.device).arch)
    _apply_kernel[(triton.cdiv(T, config.rows),)](
        total, mean, rstd, weight, bias, normed, T, D, config.rows, config.width,
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip


@device.launcher
def scale_add_forward(
    residual: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    total: torch.Tensor,
) -> None:
    """total [T, D] = residual + drop_path * scale * branch, the same bits as layer_norm_forward's total."""
    T, D = residual.shape
    if T == 0:
        return
    config = row_config(D, residual.dtype, device.device_properties(residual.device).arch)
    _scale_add_kernel[(triton.cdiv(T, config.rows),)](
        residual, branch, scale, drop_path, total, T, _rows_per_image(T, drop_path), D, config.rows, config.width,
        num_warps=config.warps, enable_fp_fusion=False,
    )  # fmt: skip


@device.launcher
def layer_norm_backward(
    d_normed: torch.Tensor,
    d_total: torch.Tensor | None,
    total: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    d_x: torch.Tensor,
    d_branch: torch.Tensor | None,
    d_scale: torch.Tensor | None,
    d_weight: torch.Tensor,
    d_bias: torch.Tensor,
) -> None:
    """d_x [T, D] = d_total + the gradient through the norm; d_branch = drop_path * scale * d_x; column sums in fp32.

    branch is read only for d_scale [D] = sum over rows of drop_path * branch * d_x.
    """
    T, D = total.shape
    sums = [d_weight, d_bias] if d_scale is None else [d_weight, d_bias, d_scale]
    if T == 0:
        for out in sums:
            out.zero_()
        return
    chip = device.device_properties(total.device)
    config = backward_rows(D, d_normed.dtype, chip.arch)
    programs = min(triton.cdiv(T, config.rows), config.programs * chip.multiprocessors)
    partials = torch.empty(len(sums), programs, D, device=total.device, dtype=torch.float32)
    rows_per_image = _rows_per_image(T, drop_path)
    inside = d_scale is not None and not config.scale_apart
    _backward_kernel[(programs,)](
        d_normed, d_total, total, mean, rstd, weight, branch, scale, drop_path, d_x, d_branch, partials,
        T, rows_per_image, D, config.rows, config.width, inside, num_warps=config.warps, maxnreg=config.registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    if d_scale is not None and config.scale_apart:
        _scale_gradient_kernel[(programs,)](
            d_x,
            branch,
            drop_path,
            partials[2],
            T,
            rows_per_image,
            D,
            config.rows,
            config.width,
            num_warps=config.warps,
            maxnreg=config.registers,
            enable_fp_fusion=True,
        )
    sum_partials(partials, *sums)
