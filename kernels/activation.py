"""GELU, exact (erf), with the tanh approximation and CLIP's quick one, and SwiGLU, forward and backward.

Legend: T rows, F hidden width, H = F, or 2F for SwiGLU, whose gate's columns come first. Hendrycks & Gimpel, "Gaussian
Error Linear Units", arXiv:1606.08415; Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202. As in layer_norm.py, multiply-adds are spelled out so that recomputing in backward, or in the epilogue of a matrix product,
gives the forward's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .configs import ACTIVATION
from .reduce import sum_partials


@triton.jit
def _normal_cdf(x, FAST: tl.constexpr):
    """Cumulative distribution of the standard normal at x, and exp(-x**2 / 2).

    FAST, for 16-bit results: Abramowitz & Stegun 7.1.26, absolute error below 1.5e-7, a tenth of erf's instructions
    since the exponential is needed anyway; erf would make the kernel wait for arithmetic instead of memory.
    """
    bell = tl.exp(-0.5 * (x * x))
    if FAST:
        t = 1.0 / tl.fma(tl.abs(x), 0.3275911 * 0.7071067811865476, 1.0)
        poly = tl.fma(t, 1.061405429, -1.453152027)
        poly = tl.fma(poly, t, 1.421413741)
        poly = tl.fma(poly, t, -0.284496736)
        poly = tl.fma(poly, t, 0.254829592)
        tail = 0.5 * (poly * t * bell)  # P(X > |x|)
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf, bell


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh_gate(x):
    """0.5 * (1 + tanh(u)) = sigmoid(2 u) for u = sqrt(2 / pi) * (x + 0.044715 * x**3)."""
    twice = x * tl.fma(x * x, 2.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654)
    return _sigmoid(twice)


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """act(x) for fp32 x ("swiglu": silu(x), its gate); the launch needs enable_fp_fusion=False for equal bits
    everywhere."""
    if KIND == "gelu":
        cdf, _bell = _normal_cdf(x, FAST)
        return x * cdf
    elif KIND == "gelu_tanh":
        return x * _tanh_gate(x)
    elif KIND == "quick_gelu":
        return x * _sigmoid(1.702 * x)
    else:
        tl.static_assert(KIND == "swiglu")
        return x * _sigmoid(x)


@triton.jit
def activate_with_slope(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """act(x) and its derivative for fp32 x; the first has activate's bits."""
    if KIND == "gelu":
        cdf, bell = _normal_cdf(x, FAST)
        return x * cdf, tl.fma(x * 0.3989422804014327, bell, cdf)
    elif KIND == "gelu_tanh":
        gate = _tanh_gate(x)
        inner = tl.fma(x * x, 6.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654)  # d(2u)/dx
        return x * gate, tl.fma(x * gate * (1.0 - gate), inner, gate)
    elif KIND == "quick_gelu":
        gate = _sigmoid(1.702 * x)
        value = x * gate
        return value, tl.fma(1.702 * value, 1.0 - gate, gate)
    else:
        tl.static_assert(KIND == "swiglu")
        gate = _sigmoid(x)
        value = x * gate
        return value, tl.fma(value, 1.0 - gate, gate)


@triton.jit
def _forward_kernel(h, out, numel, KIND: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    value = activate(tl.load(h + at, mask=mask, other=0.0).to(tl.float32), KIND, FAST)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _swiglu_forward_kernel(h, out, T, F, FAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """out [T, F] = silu(gate) * up for h [T, 2F]."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask = (rows < T)[:, None] & (cols < F)[None, :]
    at = rows[:, None] * (2 * F) + cols[None, :]
    gate = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h + at + F, mask=mask, other=0.0).to(tl.float32)
    value = activate(gate, "swiglu", FAST) * up
    tl.store(out + rows[:, None] * F + cols[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _swiglu_backward_kernel(
    h, d_act, d_h, act, partials, T, F, FAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """As _backward_kernel, for h and d_h [T, 2F]; partials [G, 2F]."""
    first = tl.program_id(1)
    G = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < F
    gate_columns = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    up_columns = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for block in range(first, tl.cdiv(T, BLOCK_T), G):
        rows = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        at = rows[:, None] * F + cols[None, :]
        gates = rows[:, None] * (2 * F) + cols[None, :]
        mask = (rows < T)[:, None] & col_mask[None, :]
        gate = tl.load(h + gates, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h + gates + F, mask=mask, other=0.0).to(tl.float32)
        incoming = tl.load(d_act + at, mask=mask, other=0.0).to(tl.float32)
        value, slope = activate_with_slope(gate, "swiglu", FAST)
        d_gate = (incoming * up * slope).to(d_h.dtype.element_ty)
        d_up = (incoming * value).to(d_h.dtype.element_ty)
        tl.store(d_h + gates, d_gate, mask=mask)
        tl.store(d_h + gates + F, d_up, mask=mask)
        if act is not None:
            tl.store(act + at, (value * up).to(act.dtype.element_ty), mask=mask)
        if partials is not None:
            gate_columns += d_gate.to(tl.float32)
            up_columns += d_up.to(tl.float32)
    if partials is not None:
        sums = partials + first * (2 * F) + cols
        tl.store(sums, tl.sum(gate_columns, axis=0), mask=col_mask)
        tl.store(sums + F, tl.sum(up_columns, axis=0), mask=col_mask)


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    h, d_act, d_h, act, partials, T, F,
    KIND: tl.constexpr, FAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Programs (column block, g): g walks every G-th block of rows and keeps the column sums of its d_h."""
    first = tl.program_id(1)
    G = tl.num_programs(1)
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    col_mask = cols < F
    columns = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for block in range(first, tl.cdiv(T, BLOCK_T), G):
        rows = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        at = rows[:, None] * F + cols[None, :]
        mask = (rows < T)[:, None] & col_mask[None, :]
        value, slope = activate_with_slope(tl.load(h + at, mask=mask, other=0.0).to(tl.float32), KIND, FAST)
        gradient = tl.load(d_act + at, mask=mask, other=0.0).to(tl.float32) * slope
        rounded = gradient.to(d_h.dtype.element_ty)
        tl.store(d_h + at, rounded, mask=mask)
        if act is not None:
            tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
        if partials is not None:
            columns += rounded.to(tl.float32)  # the sum of d_h as stored, as plain autograd has it
    if partials is not None:
        tl.store(partials + first * F + cols, tl.sum(columns, axis=0), mask=col_mask)


def is_fast(dtype: torch.dtype) -> bool:
    return dtype != torch.float32


@device.launcher
def activation_forward(h: torch.Tensor, kind: str, out: torch.Tensor) -> None:
    """out [T, F] = act(h [T, H]); kind is "gelu", "gelu_tanh", "quick_gelu" or "swiglu"."""
    numel = out.numel()
    if numel == 0:
        return
    if kind == "swiglu":
        T, F = out.shape
        config = ACTIVATION
        _swiglu_forward_kernel[(triton.cdiv(F, config.columns), triton.cdiv(T, config.rows))](
            h, out, T, F, is_fast(h.dtype), config.rows, config.columns, num_warps=config.warps, enable_fp_fusion=False
        )
        return
    _forward_kernel[(triton.cdiv(numel, ACTIVATION.block),)](
        h, out, numel, kind, is_fast(h.dtype), ACTIVATION.block, num_warps=ACTIVATION.warps, enable_fp_fusion=False
    )


@device.launcher
def activation_backward(
    h: torch.Tensor,
    d_act: torch.Tensor,
    kind: str,
    d_h: torch.Tensor,
    act: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """d_h [T, H] from d_act [T, F]; act [T, F] = act(h) again with the forward's bits; d_bias [H] = column sums of d_h."""
    T, F = d_act.shape
    if T == 0:
        if d_bias is not None:
            d_bias.zero_()
        return
    config = ACTIVATION
    columns = triton.cdiv(F, config.columns)
    wanted = triton.cdiv(config.programs * device.device_properties(h.device).multiprocessors, columns)
    strips = min(triton.cdiv(T, config.rows), wanted)
    partials = None if d_bias is None else torch.empty(1, strips, h.shape[1], device=h.device, dtype=torch.float32)
    if kind == "swiglu":
        _swiglu_backward_kernel[(columns, strips)](
            h, d_act, d_h, act, partials, T, F, is_fast(h.dtype), config.rows, config.columns,
            num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        _backward_kernel[(columns, strips)](
            h, d_act, d_h, act, partials, T, F, kind, is_fast(h.dtype), config.rows, config.columns,
            num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip
    if partials is not None and d_bias is not None:
        sum_partials(partials, d_bias)
