"""Softmax attention from packed qkv, as the qkv projection writes it, to the layout the output projection reads.

Legend: B images, L tokens, H heads, E head dim, T = B * L rows (or all rows of a packed batch), S packed sequences.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

from torch import Tensor

from .arguments import autocast_dtype, fake_gradients, gradients, statistics_dtype, wanted_only
from .attention_arguments import check_attention, dense_bias
from .dispatch import TABLE, choose, standard_backends
from .heads import HEADS_SCHEMA, HeadNorm, Heads, Rope
from .library import register

TABLE["attention"] = standard_backends("cpu", "triton", "torch")


def attention_ref(
    qkv: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rope: Rope | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch, qkv [B, L, 3, H, E] -> [B, L, H, E]; the truth in fp64."""
    q, k, v = qkv.unbind(2)
    q, k = q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k)
    if rope is not None:
        q, k = rope(q), rope(k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, L, E] each
    logits = q @ k.transpose(-2, -1) * (qkv.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if key_padding_mask is not None:
        logits = logits.masked_fill(key_padding_mask[:, None, None], float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2)


def _choose(qkv: Tensor, bias: Tensor | None, heads: Heads, backend: str) -> Any:
    def why_not(name: str) -> str | None:
        if name == "cpu" and qkv.shape[-1] > 256:
            return f"head dim {qkv.shape[-1]}: above 256"
        if name == "triton":
            limits = import_module("vitfast.kernels.configs").attention_why_not
            return limits(qkv.shape[-1], qkv.dtype, bias is not None, heads.active)
        return None

    return choose("attention", qkv, backend, why_not=why_not)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _forward(
    qkv: Tensor,
    scale: float,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    key_padding_mask: Tensor | None,
    *heads_and_backend: Any,
) -> tuple[Tensor, Tensor]:
    *fields, backend = heads_and_backend
    heads = Heads(*fields)
    return _choose(qkv, bias, heads, backend).attention_forward(
        qkv.contiguous(),
        scale,
        _contiguous(bias),
        cu_seqlens,
        max_seqlen,
        _contiguous(key_padding_mask),
        heads,
    )


def _fake_forward(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    *batch, _three, H, E = qkv.shape
    out = qkv.new_empty((*batch, H, E))
    return out, qkv.new_empty((H, math.prod(out.shape[:-2])), dtype=statistics_dtype(qkv))


def _backward(
    d_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    key_padding_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *fields, wanted, backend = rest
    heads = Heads(*fields)
    d_qkv, d_bias, d_norms = _choose(qkv, bias, heads, backend).attention_backward(
        d_out.contiguous(),
        qkv.contiguous(),
        out,
        lse,
        scale,
        _contiguous(bias),
        cu_seqlens,
        max_seqlen,
        _contiguous(key_padding_mask),
        heads,
        wanted[0],
        any(wanted[1:]),
    )
    return d_qkv, *gradients((d_bias, *d_norms), (bias, *heads.parameters), wanted, qkv)


def _fake_backward(d_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _out, _lse, _scale, bias, _cu_seqlens, _max_seqlen, _mask, *fields, wanted, _backend = rest
    return qkv.new_empty(qkv.shape), *fake_gradients((bias, *Heads(*fields).parameters), wanted, qkv)


_attention_backward = register(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, float scale, Tensor? bias, "
    f"Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_padding_mask, {HEADS_SCHEMA}, bool[] wanted, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.scale, bias, cu_seqlens, ctx.max_seqlen, mask, *fields, ctx.backend = inputs
    heads = Heads(*fields)
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, out, lse, bias, cu_seqlens, mask, heads.cos, heads.sin, *heads.parameters)
    ctx.flags = heads.interleaved, heads.q_norm, heads.k_norm
    ctx.eps = heads.q_eps, heads.k_eps


def _autograd(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Any, ...]:
    before_heads, flags, eps = 6, len(ctx.flags), len(ctx.eps)
    if d_out is None:
        return (None,) * (before_heads + len(Heads._fields) + 1)
    qkv, out, lse, bias, cu_seqlens, mask, cos, sin, *parameters = ctx.saved_tensors
    needs = ctx.needs_input_grad
    first = before_heads + 2 + flags  # where the norms' parameters start among the inputs
    wanted = [needs[2], *needs[first : first + len(parameters)]]
    heads = (cos, sin, *ctx.flags, *parameters, *ctx.eps)
    d_qkv, *found = _attention_backward(
        d_out, qkv, out, lse, ctx.scale, bias, cu_seqlens, ctx.max_seqlen, mask, *heads, wanted, ctx.backend
    )
    d_bias, *d_norms = wanted_only(found, wanted)
    return d_qkv, None, d_bias, None, None, None, *(None,) * (2 + flags), *d_norms, *(None,) * (eps + 1)


_attention = register(
    "attention(Tensor qkv, float scale, Tensor? bias, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_padding_mask, "
    f"{HEADS_SCHEMA}, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    backward=_autograd,
    setup_context=_setup_context,
)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rope: Rope | tuple[Tensor, Tensor] | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T + bias) v for every head (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        qkv: [B, L, 3, H, E], as the qkv projection writes it; or [T, 3, H, E] with ``cu_seqlens``.
        scale: of the logits; default E ** -0.5.
        bias: added to the logits; broadcasts to [B, H, L, L]; gets a gradient. -inf masks a key; a query with every key
            masked gives zeros. Not with ``cu_seqlens``.
        rope: rotary embedding of the last tokens; a pair (cos, sin) is ``Rope(cos, sin)``.
        q_norm, k_norm: norms of q and k over E, applied before the rotation; weight and bias get gradients.
        key_padding_mask: bool [B, L], True for a padding token: no query sees it as a key, and its k and v get zero
            gradient. As queries padding tokens give what any other token gives, attention over the visible keys; where
            all keys of a sequence are padding, every query gives zeros. Not with ``cu_seqlens``.
        cu_seqlens: int32 [S + 1], ascending from 0 to T: where each sequence of a packed batch starts; every token sees
            its own sequence only.
        max_seqlen: the longest sequence's length; needed with ``cu_seqlens``.
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        [B, L, H, E] (or [T, H, E]) in qkv's dtype, or autocast's. Keeps qkv as given, the result and one fp32 number for
        each row and head for backward. The same bits every run.

    Raises:
        ValueError: a shape does not fit, or arguments do not go together.
        RuntimeError: the named backend cannot run; the message has every backend's reason.
    """
    if isinstance(rope, tuple):
        rope = Rope(*rope)
    check_attention(qkv, bias, rope, {"q_norm": q_norm, "k_norm": k_norm}, key_padding_mask, cu_seqlens, max_seqlen)
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    if bias is not None:
        bias = dense_bias(bias, qkv)
    length = qkv.shape[1] if max_seqlen is None else max_seqlen
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    heads = Heads.of(rope, q_norm, k_norm, statistics_dtype(qkv))
    return _attention(qkv, scale, bias, cu_seqlens, length, key_padding_mask, *heads, backend)[0]
