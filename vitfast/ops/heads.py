"""What happens to q and k between the qkv projection and attention: a norm over the head dim, then rotary embedding.

``HeadNorm`` and ``Rope`` are what callers write, ``Heads`` is what the primitive kernels take, and ``transform`` with its
backward is the plain form of it for backends that do not fuse it.

Legend: T rows (or [B, L]), H heads, E head dim, N rotated tokens, the last N of each sequence (or all T of a packed batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nn_functional

NORMS = ("layer_norm", "rms_norm")
# The fields of ``Heads`` in an op's schema
HEADS_SCHEMA = (
    "Tensor? cos, Tensor? sin, bool interleaved, str q_norm, str k_norm, Tensor? q_weight, Tensor? q_bias, "
    "Tensor? k_weight, Tensor? k_bias, float q_eps, float k_eps"
)


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
        if self.kind not in NORMS:
            raise ValueError(f"kind is {self.kind!r}; allowed are 'layer_norm', 'rms_norm'")
        if self.kind == "rms_norm" and self.bias is not None:
            raise ValueError("bias is given; 'rms_norm' has none")

    def __call__(self, x: Tensor) -> Tensor:
        """Plain PyTorch, [..., E]."""
        if self.kind == "rms_norm":
            return nn_functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return nn_functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of q and k (Su et al. 2021, arXiv:2104.09864, eq. 34).

    Attributes:
        cos, sin: [N, E], or [N, E / 2] with one angle for each pair of elements, which is half the bytes to read. N <= L:
            the last N tokens of each sequence turn, those before them (class token, registers) stay. With ``cu_seqlens``
            one row for each packed token, N = T; cos 1 and sin 0 leave a token as it is. No gradient.
        interleaved: which elements form a pair: (2i, 2i + 1) as in EVA, or (i, i + E / 2) as in DINOv3.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Plain PyTorch, [..., L, H, E]."""
        cos, sin = (full_table(t, x.shape[-1], self.interleaved) for t in (self.cos, self.sin))
        prefix, rest = x.split([x.shape[-3] - cos.shape[0], cos.shape[0]], -3)
        turned = rest * cos + quarter_turn(rest, self.interleaved) * sin
        return torch.cat([prefix, turned.to(x.dtype)], -3)


class Heads(NamedTuple):
    """The same as the op's schema and the primitive kernels take it; a norm kind of "" is no norm."""

    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    q_norm: str = ""
    k_norm: str = ""
    q_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_weight: Tensor | None = None
    k_bias: Tensor | None = None
    q_eps: float = 0.0
    k_eps: float = 0.0

    @classmethod
    def of(cls, rope: Rope | None, q_norm: HeadNorm | None, k_norm: HeadNorm | None, dtype: torch.dtype) -> Heads:
        """From the public records; tables in ``dtype`` (fp32, fp64 for fp64)."""
        cos = sin = None
        if rope is not None:
            cos, sin = (t.detach().to(dtype).contiguous() for t in (rope.cos, rope.sin))
        q = q_norm or HeadNorm(None)
        k = k_norm or HeadNorm(None)
        q_kind, k_kind = ("" if n is None else n.kind for n in (q_norm, k_norm))
        turned = rope is not None and rope.interleaved
        return cls(cos, sin, turned, q_kind, k_kind, q.weight, q.bias, k.weight, k.bias, q.eps, k.eps)

    @property
    def active(self) -> bool:
        """Whether anything happens at all."""
        return self.cos is not None or bool(self.q_norm or self.k_norm)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What gets a gradient: q's weight and bias, k's weight and bias."""
        return self.q_weight, self.q_bias, self.k_weight, self.k_bias


def transform(qkv: Tensor, heads: Heads) -> Tensor:
    """qkv [..., L, 3, H, E] with q and k normalised and rotated, rounded once."""
    q, k, v = qkv.unbind(-3)
    q = _rotate(_norm(_wide(q), heads.q_norm, heads.q_weight, heads.q_bias, heads.q_eps), heads)
    k = _rotate(_norm(_wide(k), heads.k_norm, heads.k_weight, heads.k_bias, heads.k_eps), heads)
    return torch.stack([q.to(qkv.dtype), k.to(qkv.dtype), v], -3)


def transform_backward(
    d_qkv: Tensor, qkv: Tensor, heads: Heads, want_norms: bool
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The gradient of the qkv that ``transform`` took, and those of ``heads.parameters`` (None where there is none)."""
    d_q, d_k, d_v = d_qkv.unbind(-3)
    q, k, _ = qkv.unbind(-3)
    d_q, *q_grads = _norm_backward(_rotate_back(_wide(d_q), heads), q, heads.q_norm, heads.q_weight, heads.q_eps)
    d_k, *k_grads = _norm_backward(_rotate_back(_wide(d_k), heads), k, heads.k_norm, heads.k_weight, heads.k_eps)
    grads = tuple(
        g if p is not None and want_norms else None for g, p in zip((*q_grads, *k_grads), heads.parameters, strict=True)
    )
    return torch.stack([d_q.to(qkv.dtype), d_k.to(qkv.dtype), d_v], -3), grads


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def full_table(table: Tensor, E: int, interleaved: bool) -> Tensor:
    """[N, E] or [N, E / 2] -> [N, 1, E]."""
    if table.shape[-1] != E:
        table = table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)
    return table.unsqueeze(-2)


def quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    """(a, b) -> (-b, a) for each pair. Its transpose is its negative."""
    if interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotate(x: Tensor, heads: Heads) -> Tensor:
    if heads.cos is None or heads.sin is None:
        return x
    return Rope(heads.cos, heads.sin, heads.interleaved)(x)


def _rotate_back(d: Tensor, heads: Heads) -> Tensor:
    if heads.cos is None or heads.sin is None:
        return d
    # x' = c x + s T x with T the quarter turn, so d = c d' + T^t (s d') = c d' - T (s d')
    cos, sin = (full_table(t, d.shape[-1], heads.interleaved) for t in (heads.cos, heads.sin))
    prefix, rest = d.split([d.shape[-3] - cos.shape[0], cos.shape[0]], -3)
    return torch.cat([prefix, rest * cos - quarter_turn(rest * sin, heads.interleaved)], -3)


def _standard(x: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    """(normalised x, one over its deviation or root mean square [..., 1])."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer_norm" else x
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if not kind:
        return x
    x, _ = _standard(x, kind, eps)
    x = x if weight is None else x * _wide(weight)
    return x if bias is None else x + _wide(bias)


def _norm_backward(
    d: Tensor, x: Tensor, kind: str, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(d_x, d_weight [E], d_bias [E]), the last two None without a norm."""
    if not kind:
        return d, None, None
    standard, rstd = _standard(_wide(x), kind, eps)
    g = d if weight is None else d * _wide(weight)
    through = g - standard * (g * standard).mean(-1, keepdim=True)
    if kind == "layer_norm":
        through = through - g.mean(-1, keepdim=True)
    return through * rstd, (d * standard).flatten(0, -2).sum(0), d.flatten(0, -2).sum(0)
