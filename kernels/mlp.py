"""Matrix products with an epilogue: bias, GELU or SwiGLU, LayerScale, DropPath, residual; and the backward of the hidden
layer.

Legend: T rows, B images (row t belongs to image t // (T // B)), K columns in, N columns out, F hidden width of an MLP,
H = F, or 2F for SwiGLU (gate, then up). X is the dtype of the residual stream, Y that of the product's operands. Sums
are fp32.

Three switches of a configuration change how a tile is made, not what: `programs` on each multiprocessor take tile after
tile (0: a program for each tile), so that the next tile's operands arrive while this one is stored; `descriptors` has the tensor
memory accelerator of Hopper and later fetch the operands. `halved` finishes a tile's left and right half one after the
other, which takes fewer registers than the whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, device
from .activation import activate, activate_with_slope, is_fast
from .configs import ROW_GROUP, WIDE_RESIDUAL, ProductConfig, ProductRow, hidden_backward_config, linear_config
from .reduce import sum_partials


@triton.jit
def _tile_corner(tile, T, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column. GROUP row blocks take all their column blocks before the next group, so that the rows
    and the weights in use at one time fit in L2."""
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row_blocks = tl.cdiv(T, BLOCK_T)
    group = tile // (GROUP * column_blocks)
    first = group * GROUP
    size = tl.minimum(row_blocks - first, GROUP)
    inside = tile % (GROUP * column_blocks)
    return (first + inside % size) * BLOCK_T, (inside // size) * BLOCK_N


@triton.jit
def _left_tile(
    a, first_row, first, T, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """a[first_row:, first:] of a [T, K], 0 outside."""
    if DESCRIPTORS:
        return a.load([first_row, first])
    else:
        rows = first_row + tl.arange(0, BLOCK_T)
        k = first + tl.arange(0, BLOCK_K)
        mask = (rows < T)[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[None, :]
        return tl.load(a + rows.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def _right_tile(
    b, first_column, first, limit, N: tl.constexpr, K: tl.constexpr, BY_COLUMN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of b, which is [N, K] (BY_COLUMN: as a linear layer keeps its weight) or [K, N]; columns from
    `limit` on are 0, or nothing that is used."""
    if DESCRIPTORS:
        if BY_COLUMN:
            return b.load([first_column, first]).T
        else:
            return b.load([first, first_column])
    else:
        columns = first_column + tl.arange(0, BLOCK_N)
        k = first + tl.arange(0, BLOCK_K)
        mask = (columns < limit)[None, :]
        if K % BLOCK_K != 0:
            mask = mask & (k < K)[:, None]
        if BY_COLUMN:
            at = columns.to(tl.int64)[None, :] * K + k[:, None]
        else:
            at = k.to(tl.int64)[:, None] * N + columns[None, :]
        return tl.load(b + at, mask=mask, other=0.0)


@triton.jit
def _product(
    a, b, first_row, first_column, T, N: tl.constexpr, K: tl.constexpr, BY_COLUMN: tl.constexpr, GATED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_T, BLOCK_N] sums over k of a [T, K] times b; GATED: a second tile from the columns N further on."""
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        left = _left_tile(a, first_row, first, T, K, BLOCK_T, BLOCK_K, DESCRIPTORS)
        right = _right_tile(b, first_column, first, N, N, K, BY_COLUMN, BLOCK_N, BLOCK_K, DESCRIPTORS)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if GATED:
            up = _right_tile(b, N + first_column, first, 2 * N, N, K, BY_COLUMN, BLOCK_N, BLOCK_K, DESCRIPTORS)
            second = tl.dot(left, up, second, input_precision=PRECISION)
    return total, second


@triton.jit
def _halves(x):
    """The left and the right half of the columns of x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _finish_linear(
    value, up, first_row, first_column, bias, residual, scale, drop_path, h, out, T, rows_per_image,
    N: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile of sums at (first_row, first_column); `up` is the second tile of SwiGLU."""
    GATED: tl.constexpr = KIND == "swiglu"
    HALVES: tl.constexpr = 2 if GATED else 1
    rows = first_row + tl.arange(0, value.shape[0])
    cols = first_column + tl.arange(0, value.shape[1])
    row_mask = rows < T
    col_mask = cols < N
    mask = row_mask[:, None] & col_mask[None, :]
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    if bias is not None:
        value += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + N + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if KIND is not None:
        # backward recomputes from the stored h, so the activation is of that one
        rounded = value.to(out.dtype.element_ty)
        value = activate(rounded.to(tl.float32), KIND, FAST)
        at_h = rows.to(tl.int64)[:, None] * (HALVES * N) + cols[None, :]
        if h is not None:
            tl.store(h + at_h, rounded, mask=mask)
        if GATED:
            rounded_up = up.to(out.dtype.element_ty)
            value = value * rounded_up.to(tl.float32)
            if h is not None:
                tl.store(h + at_h + N, rounded_up, mask=mask)
    if scale is not None:
        value = value * tl.load(scale + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if drop_path is not None:
        value = value * tl.load(drop_path + rows // rows_per_image, mask=row_mask, other=0.0)[:, None]
    if residual is not None:
        value += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _linear_tile(
    tile, x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = KIND == "swiglu"
    first_row, first_column = _tile_corner(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
    value, up = _product(
        x, weight, first_row, first_column, T, N, K, True, GATED, BLOCK_T, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION
    )
    if HALVED:
        left, right = _halves(value)
        up_left, up_right = _halves(up)
        _finish_linear(
            left, up_left, first_row, first_column, bias, residual, scale, drop_path, h, out, T, rows_per_image,
            N, KIND, FAST,
        )  # fmt: skip
        _finish_linear(
            right, up_right, first_row, first_column + BLOCK_N // 2, bias, residual, scale, drop_path, h, out, T,
            rows_per_image, N, KIND, FAST,
        )  # fmt: skip
    else:
        _finish_linear(
            value, up, first_row, first_column, bias, residual, scale, drop_path, h, out, T, rows_per_image,
            N, KIND, FAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "rows_per_image"])
def _linear_kernel(
    x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image,
    N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        tiles = tl.cdiv(T, BLOCK_T) * ((N + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _linear_tile(
                tile, x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image,
                N, K, KIND, FAST, BLOCK_T, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, HALVED, PRECISION,
            )  # fmt: skip
    else:
        _linear_tile(
            tl.program_id(0), x, weight, bias, residual, scale, drop_path, h, out, T, rows_per_image,
            N, K, KIND, FAST, BLOCK_T, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, HALVED, PRECISION,
        )  # fmt: skip


@triton.jit
def _finish_hidden_backward(
    d_act, first_row, first_column, h, d_h, act, partials, T, F: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr
):
    """The epilogue of a tile of d_act at (first_row, first_column)."""
    GATED: tl.constexpr = KIND == "swiglu"
    H: tl.constexpr = 2 * F if GATED else F
    rows = first_row + tl.arange(0, d_act.shape[0])
    cols = first_column + tl.arange(0, d_act.shape[1])
    col_mask = cols < F
    mask = (rows < T)[:, None] & col_mask[None, :]
    at_h = rows.to(tl.int64)[:, None] * H + cols[None, :]
    sums = first_row.to(tl.int64) // d_act.shape[0] * H + cols
    value, slope = activate_with_slope(tl.load(h + at_h, mask=mask, other=0.0).to(tl.float32), KIND, FAST)
    if GATED:
        up = tl.load(h + at_h + F, mask=mask, other=0.0).to(tl.float32)
        d_up = (d_act * value).to(d_h.dtype.element_ty)
        tl.store(d_h + at_h + F, d_up, mask=mask)
        if partials is not None:
            tl.store(partials + sums + F, tl.sum(d_up.to(tl.float32), axis=0), mask=col_mask)
        value = value * up
        d_act = d_act * up
    gradient = (d_act * slope).to(d_h.dtype.element_ty)
    tl.store(d_h + at_h, gradient, mask=mask)
    if act is not None:
        at = rows.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
    if partials is not None:  # rows past T are 0: their d_out is
        tl.store(partials + sums, tl.sum(gradient.to(tl.float32), axis=0), mask=col_mask)


@triton.jit
def _hidden_backward_tile(
    tile, d_out, weight, h, d_h, act, partials, T,
    F: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, first_column = _tile_corner(tile, T, F, BLOCK_T, BLOCK_N, GROUP)
    d_act, _unused = _product(
        d_out, weight, first_row, first_column, T, F, N, False, False,
        BLOCK_T, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
    )  # fmt: skip
    if HALVED:
        left, right = _halves(d_act)
        _finish_hidden_backward(left, first_row, first_column, h, d_h, act, partials, T, F, KIND, FAST)
        _finish_hidden_backward(right, first_row, first_column + BLOCK_N // 2, h, d_h, act, partials, T, F, KIND, FAST)
    else:
        _finish_hidden_backward(d_act, first_row, first_column, h, d_h, act, partials, T, F, KIND, FAST)


@triton.jit(do_not_specialize=["T"])
def _hidden_backward_kernel(
    d_out, weight, h, d_h, act, partials, T,
    F: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr, DESCRIPTORS: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_h [T, H] from d_act = d_out [T, N] weight [N, F]; partials [row blocks, H] its column sums."""
    if PERSISTENT:
        tiles = tl.cdiv(T, BLOCK_T) * ((F + BLOCK_N - 1) // BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _hidden_backward_tile(
                tile, d_out, weight, h, d_h, act, partials, T,
                F, N, KIND, FAST, BLOCK_T, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, HALVED, PRECISION,
            )  # fmt: skip
    else:
        _hidden_backward_tile(
            tl.program_id(0), d_out, weight, h, d_h, act, partials, T,
            F, N, KIND, FAST, BLOCK_T, BLOCK_N, BLOCK_K, GROUP, DESCRIPTORS, HALVED, PRECISION,
        )  # fmt: skip


def _describable(x: torch.Tensor) -> bool:
    """What the tensor memory accelerator asks of a row-major matrix."""
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def _programs(tiles: int, config: ProductConfig, on: torch.device) -> int:
    resident = config.programs * device.device_properties(on).multiprocessors
    return min(tiles, resident) if config.programs else tiles


def product_choice(unit: str, rows: int, columns: int, depth: int, dtype: torch.dtype, on: torch.device) -> ProductRow:
    """Which path a product of [rows, depth] with `columns` outputs takes on that device; unit as in product_table.py."""
    return configs.product_choice(unit, rows, columns, depth, dtype, device.device_properties(on).arch)


def _launch_linear(x, weight, bias, residual, scale, drop_path, kind, h, out, config) -> None:
    T, K = x.shape
    N = out.shape[1]
    if T == 0:
        return
    if config is None:
        wide = residual is not None and residual.element_size() > x.element_size()
        config = linear_config(
            T, N, K, WIDE_RESIDUAL if wide else kind, x.dtype, device.device_properties(x.device).arch
        )
    described = config.descriptors and _describable(x) and _describable(weight)
    if described:
        x_tiles = TensorDescriptor.from_tensor(x, [config.rows, config.depth])
        weight_tiles = TensorDescriptor.from_tensor(weight, [config.columns, config.depth])
    else:
        x_tiles, weight_tiles = x, weight
    tiles = triton.cdiv(T, config.rows) * triton.cdiv(N, config.columns)
    rows_per_image = 1 if drop_path is None else T // drop_path.shape[0]
    _linear_kernel[(_programs(tiles, config, x.device),)](
        x_tiles, weight_tiles, bias, residual, scale, drop_path, h, out, T, rows_per_image, N, K, kind,
        is_fast(x.dtype), config.rows, config.columns, config.depth, ROW_GROUP, config.programs > 0, described, config.halved,
        device.dot_precision(x.dtype),
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        enable_fp_fusion=kind is None,
    )  # fmt: skip


@device.launcher
def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: ProductConfig | None = None,
) -> None:
    """out [T, N] = x [T, K] weight [N, K]^T + bias [N]; ``config`` instead of the one chosen by shape."""
    _launch_linear(x, weight, bias, None, None, None, None, None, out, config)


@device.launcher
def linear_activation_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
    h: torch.Tensor | None,
    act: torch.Tensor,
    config: ProductConfig | None = None,
) -> None:
    """h [T, H] = x weight [H, K]^T + bias, kept for backward where asked for, and act [T, F] = act(h as stored)."""
    _launch_linear(x, weight, bias, None, None, None, kind, h, act, config)


@device.launcher
def linear_residual_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    drop_path: torch.Tensor | None,
    total: torch.Tensor,
    config: ProductConfig | None = None,
) -> None:
    """total [T, N] X = residual + drop_path * scale * (x weight^T + bias), the product never rounded to Y between."""
    _launch_linear(x, weight, bias, residual, scale, drop_path, None, None, total, config)


@device.launcher
def hidden_backward(
    d_out: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    kind: str,
    d_h: torch.Tensor,
    act: torch.Tensor | None,
    d_bias: torch.Tensor | None,
    config: ProductConfig | None = None,
) -> None:
    """d_h [T, H], the gradient of h where out = act(h) weight^T, from d_out [T, N] and weight [N, F]; act [T, F] and
    d_bias [H] as in activation_backward."""
    T, N = d_out.shape
    F = weight.shape[1]
    if T == 0:
        if d_bias is not None:
            d_bias.zero_()
        return
    if config is None:
        config = hidden_backward_config(T, F, N, kind, h.dtype, device.device_properties(h.device).arch)
    described = config.descriptors and _describable(d_out) and _describable(weight)
    if described:
        d_out_tiles = TensorDescriptor.from_tensor(d_out, [config.rows, config.depth])
        weight_tiles = TensorDescriptor.from_tensor(weight, [config.depth, config.columns])
    else:
        d_out_tiles, weight_tiles = d_out, weight
    row_blocks = triton.cdiv(T, config.rows)
    tiles = row_blocks * triton.cdiv(F, config.columns)
    partials = None if d_bias is None else torch.empty(1, row_blocks, h.shape[1], device=h.device, dtype=torch.float32)
    _hidden_backward_kernel[(_programs(tiles, config, h.device),)](
        d_out_tiles, weight_tiles, h, d_h, act, partials, T, F, N, kind, is_fast(h.dtype),
        config.rows, config.columns, config.depth, ROW_GROUP, config.programs > 0, described, config.halved,
        device.dot_precision(h.dtype), num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers, enable_fp_fusion=False,
    )  # fmt: skip
    if partials is not None and d_bias is not None:
        sum_partials(partials, d_bias)
