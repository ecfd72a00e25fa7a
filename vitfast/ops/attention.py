"""Softmax attention from packed qkv, as the qkv projection writes it, to the layout the output projection reads.

Legend: B images, L tokens, H heads, E head dim, T = B * L rows (or all rows of a packed batch), S packed sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

from .arguments import nothing, statistics_dtype
from .dispatch import TABLE, choose, standard_backends
from .library import register

TABLE["attention"] = standard_backends("cpu", "triton", "torch")


@dataclass(frozen=True)
class HeadNorm:
    """A norm over the head dimension of q or k (Dehghani et al. 2023, arXiv:2302.05442, section 2).

    Attributes:
        weight: [E], or None.
        bias: [E], or None; only for "layer_norm".
        eps: added to the variance (or the mean square).
        kind: "layer_norm" or "rms_norm".
    """

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-6
    kind: str = "layer_norm"

    def __post_init__(self) -> None:
        if self.kind not in ("layer_norm", "rms_norm"):
            raise ValueError(f"kind is {self.kind!r}; allowed are 'layer_norm', 'rms_norm'")
        if self.kind == "rms_norm" and self.bias is not None:
            raise ValueError("bias is given; 'rms_norm' has none")

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "rms_norm":
            return nn_functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return nn_functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def attention_ref(qkv: Tensor, *, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch, qkv [B, L, 3, H, E] -> [B, L, H, E]; the truth in fp64."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, L, E] each
    logits = q @ k.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2)


def _forward(
    qkv: Tensor, scale: float, bias: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int, backend: str
) -> tuple[Tensor, Tensor]:
    kernels = choose("attention", qkv, backend)
    bias = None if bias is None else bias.contiguous()
    return kernels.attention_forward(qkv.contiguous(), scale, bias, cu_seqlens, max_seqlen)


def _fake_forward(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    *batch, _three, H, E = qkv.shape
    out = qkv.new_empty((*batch, H, E))
    return out, qkv.new_empty((H, out.shape[:-2].numel()), dtype=statistics_dtype(qkv))


def _backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    want_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernels = choose("attention", qkv, backend)
    d_qkv, d_bias = kernels.attention_backward(
        d_out.contiguous(),
        qkv.contiguous(),
        out,
        lse,
        scale,
        None if bias is None else bias.contiguous(),
        cu_seqlens,
        max_seqlen,
        want_bias,
    )
    return d_qkv, nothing(qkv) if d_bias is None or bias is None else d_bias.to(bias.dtype)


def _fake_backward(d_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _out, _lse, _scale, bias, _cu_seqlens, _max_seqlen, want_bias, _backend = rest
    d_bias = nothing(qkv) if bias is None or not want_bias else bias.new_empty(bias.shape)
    return qkv.new_empty(qkv.shape), d_bias


_attention_backward = register(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor? bias, "
    "Tensor? cu_seqlens, SymInt max_seqlen, bool want_bias, str backend) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale, bias, cu_seqlens, ctx.max_seqlen, ctx.backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, bias, cu_seqlens)


def _autograd(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    if d_out is None:
        return (None,) * 6
    qkv, out, lse, bias, cu_seqlens = ctx.saved_tensors
    want_bias = ctx.needs_input_grad[2]
    d_qkv, d_bias = _attention_backward(
        d_out, qkv, out, lse, ctx.scale, bias, cu_seqlens, ctx.max_seqlen, want_bias, ctx.backend
    )
    return d_qkv, None, d_bias if want_bias else None, None, None, None


_attention = register(
    "attention(Tensor qkv, float scale, Tensor? bias, Tensor? cu_seqlens, SymInt max_seqlen, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last tokens of x [..., L, H, E]; cos and sin are [N, E], N <= L: prefix tokens stay."""
    prefix, patches = x.split([x.shape[-3] - cos.shape[0], cos.shape[0]], -3)
    first, second = patches.chunk(2, -1)
    turned = patches * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)
    return torch.cat([prefix, turned.to(x.dtype)], -3)


def _check(qkv: Tensor, bias: Tensor | None, rope: Any, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    packed = cu_seqlens is not None
    if qkv.dim() != (4 if packed else 5) or qkv.shape[-3] != 3:
        allowed = "(T, 3, H, E) with cu_seqlens" if packed else "(B, L, 3, H, E)"
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; allowed: {allowed}")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError("max_seqlen is given without cu_seqlens")
    else:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(
                f"cu_seqlens is {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}; allowed: (S + 1,) of torch.int32"
            )
        if max_seqlen is None:
            raise ValueError("max_seqlen is missing; cu_seqlens needs the longest sequence's length")
        if bias is not None or rope is not None:
            raise ValueError("bias and rope are not available with cu_seqlens")
    if rope is not None:
        for name, table in zip(("rope's cos", "rope's sin"), rope, strict=True):
            if table.dim() != 2 or table.shape[0] > qkv.shape[1] or table.shape[1] != qkv.shape[-1]:
                raise ValueError(
                    f"{name} has shape {tuple(table.shape)}; allowed: (N <= {qkv.shape[1]}, {qkv.shape[-1]})"
                )


def _dense_bias(bias: Tensor, qkv: Tensor) -> Tensor:
    """Broadcast the query and key dimensions, keep 1 for shared batch or heads -> [1 or B, 1 or H, L, L]."""
    B, L, _, H, _ = qkv.shape
    full = (B, H, L, L)
    if bias.dim() > 4 or any(b not in (1, f) for b, f in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; allowed: anything that broadcasts to {full}")
    bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
    return bias.expand(*bias.shape[:2], L, L)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + bias) v for every head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        qkv: [B, L, 3, H, E], as the qkv projection writes it; or [T, 3, H, E] with ``cu_seqlens``.
        scale: of the logits; default E ** -0.5.
        bias: added to the logits; broadcasts to [B, H, L, L]; gets a gradient. -inf masks a key; a query with every key
            masked gives zeros.
        rope: (cos, sin), each [N, E] with N <= L: rotary embedding of the last N tokens (Su et al. 2021,
            arXiv:2104.09864), element i paired with i + E / 2.
        q_norm, k_norm: norms of q and k over E, applied before the rotation.
        cu_seqlens: int32 [S + 1], ascending from 0 to T: where each sequence of a packed batch starts; every token sees
            its own sequence only.
        max_seqlen: the longest sequence's length; needed with ``cu_seqlens``.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [B, L, H, E] (or [T, H, E]) in qkv's dtype, or autocast's. Keeps qkv, the result and one fp32 number for each row
        and head for backward. The same bits every run.

    Raises:
        ValueError: a shape does not fit, or arguments do not go together.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    _check(qkv, bias, rope, cu_seqlens, max_seqlen)
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    if q_norm is not None or k_norm is not None or rope is not None:
        q, k, v = qkv.unbind(-3)
        q = q if q_norm is None else q_norm(q).to(qkv.dtype)
        k = k if k_norm is None else k_norm(k).to(qkv.dtype)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        qkv = torch.stack([q, k, v], -3)
    if bias is not None:
        bias = _dense_bias(bias, qkv)
    length = qkv.shape[1] if max_seqlen is None else max_seqlen
    return _attention(qkv, qkv.shape[-1] ** -0.5 if scale is None else scale, bias, cu_seqlens, length, backend)[0]
