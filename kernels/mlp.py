"""Matrix products with an epilogue (bias, GELU, LayerScale, DropPath, residual), and the backward of GELU.

Legend: T rows, B images (row t belongs to image t // (T // B)), K columns in, N columns out, F hidden width of an MLP.
X is the dtype of the residual stream, Y that of the product's operands. Sums are fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .activation import activate, activate_with_slope, is_fast
from .configs import ROW_GROUP, activation_backward_config, linear_config
from .reduce import sum_partials


@triton.jit
def _tile_of_program(T, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column block. GROUP row blocks take all their column blocks before the next group, so that the rows and
    the weights in use at one time fit in L2."""
    program = tl.program_id(0)
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_blocks = tl.cdiv(T, BLOCK_T)
    group = program // (GROUP * column_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = program % (GROUP * column_blocks)
    return first + inside % size, inside // size


@triton.jit
def _product(
    a, b, rows, cols, row_mask, col_mask, stride_bn, stride_bk,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, BLOCK_N] sum over k of a[rows, k] * b(cols, k), for a [T, K] and b given by its strides."""
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    row_start = a + rows.to(tl.int64)[:, None] * K
    col_start = b + cols[None, :] * stride_bn
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a_mask = row_mask[:, None]
        b_mask = col_mask[None, :]
        if K % BLOCK_K != 0:
            a_mask = a_mask & (k < K)[None, :]
            b_mask = b_mask & (k < K)[:, None]
        left = tl.load(row_start + k[None, :], mask=a_mask, other=0.0)
        right = tl.load(col_start + k[:, None] * stride_bk, mask=b_mask, other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _linear_kernel(
    x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_block, column_block = _tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    col_mask = cols < N
    value = _product(x, weight, rows, cols, row_mask, col_mask, K, 1, K, BLOCK_T, BLOCK_N, BLOCK_K, PRECISION)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    if bias is not None:
        value += tl.load(bias + cols, mask=col_mask, other=0.0)[None, :]
    if KIND is not None:
        rounded = value.to(
            out.dtype.element_ty
        )  # backward recomputes from the stored h, so the activation is of that one
        if h is not None:
            tl.store(h + at, rounded, mask=mask)
        value = activate(rounded.to(tl.float32), KIND, FAST)
    if scale is not None:
        value = value * tl.load(scale + cols, mask=col_mask, other=0.0)[None, :]
    if drop_path is not None:
        value = value * tl.load(drop_path + rows // rows_per_image, mask=row_mask, other=0.0)[:, None]
    if residual is not None:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _activation_backward_kernel(
    d_out, weight, h, d_h, act, partials, T,
    F: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_h [T, F] = (d_out [T, N] weight [N, F]) * act'(h); partials [row blocks, F] its column sums."""
    row_block, column_block = _tile_of_program(T, F, BLOCK_T, BLOCK_N, GROUP)
    rows = row_block * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < T
    col_mask = cols < F
    d_act = _product(d_out, weight, rows, cols, row_mask, col_mask, 1, F, N, BLOCK_T, BLOCK_N, BLOCK_K, PRECISION)
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    mask = row_mask[:, None] & col_mask[None, :]
    value, slope = activate_with_slope(tl.load(h + at, mask=mask, other=0.0).to(tl.float32), KIND, FAST)
    gradient = (d_act * slope).to(d_h.dtype.element_ty)
    tl.store(d_h + at, gradient, mask=mask)
    if act is not None:
        tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
    if partials is not None:
        sums = tl.sum(gradient.to(tl.float32), axis=0)  # rows past T are 0: their d_out is
        tl.store(partials + row_block.to(tl.int64) * F + cols, sums, mask=col_mask)


def _launch_linear(x, weight, bias, residual, scale, drop_path, kind, h, out) -> None:
    T, K = x.shape
    N = weight.shape[0]
    if T == 0:
        return
    config = linear_config(T, N, K, x.dtype, device.device_properties(x.device).arch)
    rows_per_image = 1 if drop_path is None else T // drop_path.shape[0]
    grid = (triton.cdiv(T, config.rows) * triton.cdiv(N, config.columns),)
    _linear_kernel[grid](
        x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image, N, K, kind, is_fast(x.dtype),
        config.rows, config.columns, config.depth, ROW_GROUP, device.dot_precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=kind is None,
    )  # fmt: skip


@device.launcher
def linear_forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out [T, N] = x [T, K] weight [N, K]^T + bias [N] (fp32)."""
    _launch_linear(x, weight, bias, None, None, None, None, None, out)


@device.launcher
def linear_activation_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    h: torch.Tensor | None,
    act: torch.Tensor,
) -> None:
    """h [T, F] = x weight^T + bias, kept for backward where asked for, and act [T, F] = act(h as stored)."""
    _launch_linear(x, weight, bias, None, None, None, kind, h, act)


@device.launcher
def linear_residual_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    total: torch.Tensor,
) -> None:
    """total [T, N] X = residual + drop_path * scale * (x weight^T + bias), the product never rounded to Y between."""
    _launch_linear(x, weight, bias, residual, scale, drop_path, None, None, total)


@device.launcher
def linear_activation_backward(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    kind: str,
    d_h: torch.Tensor,
    act: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """d_h [T, F] = (d_out [T, N] weight [N, F]) * act'(h), for out = act(h) weight^T; act and d_bias as in
    activation_backward."""
    T, F = h.shape
    N = d_out.shape[1]
    if T == 0:
        if d_bias is not None:
            d_bias.zero_()
        return
    config = activation_backward_config(F, N, h.dtype, device.device_properties(h.device).arch)
    row_blocks = triton.cdiv(T, config.rows)
    partials = None if d_bias is None else torch.empty(1, row_blocks, F, device=h.device, dtype=torch.float32)
    _activation_backward_kernel[(row_blocks * triton.cdiv(F, config.columns),)](
        d_out, weight, h, d_h, act, partials, T, F, N, kind, is_fast(h.dtype),
        config.rows, config.columns, config.depth, ROW_GROUP, device.dot_precision(h.dtype),
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if partials is not None and d_bias is not None:
        sum_partials(partials, d_bias)
