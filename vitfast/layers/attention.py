"""Multi-head self-attention: one packed projection to q, k and v, in each of the layouts that checkpoints use.

B images, L tokens, D width, C = 3 * D, H heads, E head dim. A packed batch has [T, ...] in place of [B, L, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import ops
from vitfast.layers.halves import Linear
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.tokens import FULL, Tokens
from vitfast.layers.untouched import remember_parts, untouched


class Attention(nn.Module):
    """Projection to q, k and v, softmax attention, output projection (Vaswani et al. 2017; Dosovitskiy et al. 2021, A).

    ``qk_norm`` normalises q and k over E (Dehghani et al. 2023, section 2), ``scale_norm`` the heads' joined output
    before the projection. ``attn_drop`` is dropout on the attention weights, ``proj_drop`` after the projection.
    ``Block`` fuses the two projections with their neighbours and so calls ``attend`` and reads the weights directly.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} and width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attn_drop = attn_drop
        self.proj_drop = proj_drop
        self.backend = backend
        self._make_projection(dim, qkv_bias)
        self.q_norm = LayerNorm(self.head_dim, norm_eps, backend=backend) if qk_norm else nn.Identity()
        self.k_norm = LayerNorm(self.head_dim, norm_eps, backend=backend) if qk_norm else nn.Identity()
        self.norm = LayerNorm(dim, norm_eps, backend=backend) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        remember_parts(self)

    def _make_projection(self, dim: int, bias: bool) -> None:
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)

    def qkv_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight [C, D] and bias [C] of the projection to q, k and v in one."""
        return self.qkv.weight, self.qkv.bias

    def qkv_layers(self) -> tuple[Linear, ...]:
        """The projection's parameters where they are: one layer, or those of q, k and v."""
        return (Linear(self.qkv.weight, self.qkv.bias),)

    def project(self, x_BLD: Tensor) -> Tensor:
        """q, k and v [B, L, C] by calling the sub-modules, whatever they have become."""
        return self.qkv(x_BLD)

    def attend(self, qkv_BLC: Tensor, tokens: Tokens = FULL) -> Tensor:
        """Attention on the qkv projection's output [B, L, C], to [B, L, D], both packed as timm packs them."""
        qkv = qkv_BLC.unflatten(-1, (3, self.num_heads, self.head_dim))
        rope, bias, padding = tokens.rope, tokens.visible_bias(qkv), tokens.padding
        drops = self.training and self.attn_drop > 0.0
        norms = (_head_norm(self.q_norm), _head_norm(self.k_norm))
        if drops or not _head_norms_fit(self) or (rope is not None and not rope.shared):
            q, k, v = self.heads(qkv, tokens)
            if drops:
                return self._attend_with_dropout(q, k, v, tokens)
            qkv, norms, rope = torch.stack([q, k, v], -3), (None, None), None
        out = ops.attention(
            qkv,
            bias=bias,
            rope=None if rope is None else ops.Rope(*rope),
            q_norm=norms[0],
            k_norm=norms[1],
            key_padding_mask=padding,
            cu_seqlens=tokens.cu_seqlens,
            max_seqlen=tokens.max_seqlen,
            backend=self.backend,
        )
        return out.flatten(-2)

    def attend_first(self, q_B1D: Tensor, kv_BLC: Tensor, tokens: Tokens) -> Tensor:
        """What the first token (one that does not rotate) gets from all: its query and all keys and values, to [B, 1, D].

        In plain PyTorch, as it is a 1 / L of an attention, and elementwise, which autocast leaves in fp32.
        """
        q = q_B1D.unflatten(-1, (self.num_heads, self.head_dim))  # [B, 1, H, E]
        k, v = kv_BLC.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if tokens.rope is not None:
            k = tokens.rope.rotate(k)
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        weights_BLH = ((q.to(wide) * k.to(wide)).sum(-1) * self.head_dim**-0.5).softmax(1)
        return (weights_BLH.unsqueeze(-1) * v.to(wide)).sum(1, keepdim=True).flatten(2).to(v.dtype)

    def heads(self, qkv: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [..., L, H, E] out of qkv [..., L, 3, H, E], q and k normalised and rotated, in plain PyTorch."""
        q, k, v = qkv.unbind(-3)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if tokens.rope is not None:
            q, k = tokens.rope.rotate(q), tokens.rope.rotate(k)
        return q, k, v

    def _attend_with_dropout(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
        """The kernels draw no elements, so PyTorch's own attention does; a packed batch pays for its [T, T] mask."""
        bias = tokens.full_bias(q) if tokens.cu_seqlens is None else tokens.block_diagonal(q)
        q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=self.attn_drop)
        return out.transpose(-3, -2).flatten(-2)

    def maps(self, x_BLD: Tensor, tokens: Tokens = FULL, heads: Sequence[int] | None = None) -> Tensor:
        """The softmax of the chosen heads [B, heads, L, L], in fp32, from this layer's normalised input.

        Projects to q and k of those heads only; heads None: all of them.
        """
        chosen = list(range(self.num_heads)) if heads is None else list(heads)
        if untouched(self):
            weight, bias = self.qkv_parameters()
            rows = (3, self.num_heads, self.head_dim)
            weight = weight.unflatten(0, rows)[:2, chosen].flatten(0, 2)
            bias = None if bias is None else bias.unflatten(0, rows)[:2, chosen].flatten()
            qk = ops.linear(x_BLD, weight, bias).unflatten(-1, (2, len(chosen), self.head_dim))
        else:
            qk = self.project(x_BLD).unflatten(-1, (3, self.num_heads, self.head_dim))[..., :2, chosen, :]
        q, k = qk.unbind(-3)
        q, k = self.q_norm(q), self.k_norm(k)
        if tokens.rope is not None:
            rope = tokens.rope
            if not rope.shared and rope.cos.shape[-2] > 1:
                rope = rope._replace(cos=rope.cos[..., chosen, :], sin=rope.sin[..., chosen, :])
            q, k = rope.rotate(q), rope.rotate(k)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k = (x.transpose(-3, -2).to(wide) for x in (q, k))
        logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        added = tokens.full_bias(logits)
        if added is not None:
            logits = logits + (added if added.ndim < 3 or added.shape[-3] == 1 else added[..., chosen, :, :])
        return logits.softmax(-1)

    def forward(self, x_BLD: Tensor, tokens: Tokens = FULL) -> Tensor:
        fused = untouched(self)
        qkv = ops.linear(x_BLD, *self.qkv_parameters()) if fused else self.project(x_BLD)
        out = self.norm(self.attend(qkv, tokens))
        out = ops.linear(out, self.proj.weight, self.proj.bias) if fused else self.proj(out)
        return F.dropout(out, self.proj_drop, self.training)


class SplitBiasAttention(Attention):
    """EVA's layout: one weight without a bias, and biases of their own for q and v; k has none."""

    def _make_projection(self, dim: int, bias: bool) -> None:
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def _bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def qkv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.qkv.weight, self._bias()

    def qkv_layers(self) -> tuple[Linear, ...]:
        bias = self._bias()
        return (Linear(self.qkv.weight, bias, () if bias is None else (self.q_bias, None, self.v_bias)),)

    def project(self, x_BLD: Tensor) -> Tensor:
        qkv, bias = self.qkv(x_BLD), self._bias()
        return qkv if bias is None else qkv + bias.to(qkv.dtype)


class SeparateAttention(Attention):
    """EVA-02's layout: three projections, no bias for k. They run as one, joined anew in each forward."""

    def _make_projection(self, dim: int, bias: bool) -> None:
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=bias)

    def qkv_parameters(self) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        if self.q_proj.bias is None:
            return weight, None
        return weight, torch.cat([self.q_proj.bias, torch.zeros_like(self.q_proj.bias), self.v_proj.bias])

    def qkv_layers(self) -> tuple[Linear, ...]:
        return tuple(Linear(layer.weight, layer.bias) for layer in (self.q_proj, self.k_proj, self.v_proj))

    def project(self, x_BLD: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)], -1)


QKV_LAYOUTS: dict[str, type[Attention]] = {
    "fused": Attention,
    "split_bias": SplitBiasAttention,
    "separate": SeparateAttention,
}


def _head_norms_fit(attention: Attention) -> bool:
    """Whether the op may read q_norm's and k_norm's weights past the modules."""
    return isinstance(attention.q_norm, nn.Identity) or untouched(attention)


def _head_norm(norm: nn.Module) -> ops.HeadNorm | None:
    return ops.HeadNorm(norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None
