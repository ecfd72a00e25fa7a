"""One pre-norm transformer block: four ops in training, two at inference.

B images, L tokens, D width, C = 3 * D, F mlp hidden. A packed batch has [T, ...] in place of [B, L, ...].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import ops
from vitfast.layers.attention import QKV_LAYOUTS
from vitfast.layers.drop_path import DropPath
from vitfast.layers.halves import AttentionHalf, Halves, Linear, MlpHalf, Norm
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.layer_scale import LayerScale
from vitfast.layers.mlp import Mlp, SwiGLU
from vitfast.layers.tokens import FULL, Tokens
from vitfast.layers.untouched import remember_parts, untouched, watched


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)) (Dosovitskiy et al. 2021, equations 2 and 3).

    ``init_values`` turns LayerScale on, ``drop_path`` drops whole branches per sample, ``proj_drop`` is the dropout
    after proj, fc1 and fc2, ``attn_drop`` on the attention weights. ``qkv_layout`` is "fused", "split_bias" or
    "separate" (see ``layers.attention``), ``mlp_layer`` "mlp", "swiglu_packed" or "swiglu" (see ``layers.mlp``).
    ``recompute`` is "none", "fused" or "mlp" (see ``ops.norm_mlp``).

    ``precision`` "int8" multiplies in 8-bit integers in eval mode while no gradient is wanted, but for weights that a
    layout joins anew at each call.

    The fused ops read the weights of norm1, attn.qkv, ...; where one of these has a hook or was replaced, the block
    calls its sub-modules instead (see ``layers.untouched``).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        qkv_bias: bool = True,
        qkv_layout: str = "fused",
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        mlp_layer: str = "mlp",
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        recompute: str = "fused",
        precision: str = "float",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.recompute = recompute
        self.precision = precision
        self.norm1 = LayerNorm(dim, norm_eps, backend=backend)
        self.attn = QKV_LAYOUTS[qkv_layout](
            dim,
            num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, norm_eps, backend=backend)
        self.mlp = (SwiGLU if mlp_layer == "swiglu" else Mlp)(
            dim,
            mlp_hidden,
            activation=activation if mlp_layer == "mlp" else "swiglu",
            scale_norm=scale_mlp_norm,
            norm_eps=norm_eps,
            drop=proj_drop,
            backend=backend,
        )
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path)
        remember_parts(self)

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """LayerScale's two factors [D], None where there is none."""
        return _gamma(self.ls1), _gamma(self.ls2)

    def _scale(self, branch_BLD: Tensor, which: int) -> Tensor:
        """A branch times its factor, by calling what holds it."""
        return (self.ls1, self.ls2)[which](branch_BLD)

    def forward(self, x_BLD: Tensor, tokens: Tokens = FULL) -> Tensor:
        if self._attention_is_one_op(tokens):
            x_BLD = self._norm_attention(x_BLD)
        else:
            x_BLD, _ = self.add_attention(x_BLD, tokens)
        return self.add_mlp(x_BLD, tokens)

    def _attention_is_one_op(self, tokens: Tokens) -> bool:
        """At inference, on whole images, with nothing between the projections but attention."""
        if torch.is_grad_enabled() or self.training or not tokens.plain or self.precision == "int8":
            return False
        attn = self.attn
        bare = all(isinstance(part, nn.Identity) for part in (attn.q_norm, attn.k_norm, attn.norm))
        return bare and untouched(self)

    def _norm_attention(self, x_BLD: Tensor) -> Tensor:
        attn, norm = self.attn, self.norm1
        return ops.norm_attention(
            x_BLD,
            norm.weight,
            norm.bias,
            *attn.qkv_parameters(),
            attn.proj.weight,
            attn.proj.bias,
            attn.num_heads,
            norm.eps,
            scale=self.scales()[0],
            backend=self.backend,
        )

    def class_token(self, x_BLD: Tensor, tokens: Tokens = FULL) -> Tensor:
        """The first token [B, 1, D] of what this block returns: the others give keys and values, and no more is made of them."""
        attn, first_B1D = self.attn, x_BLD[:, :1]
        weight, bias = attn.qkv_parameters()
        split = [weight.shape[0] // 3, weight.shape[0] - weight.shape[0] // 3]
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            weight.split(split),
            (None, None) if bias is None else bias.split(split),
        )
        q_B1D = self._norm_linear(first_B1D, self.norm1, q_weight, q_bias)
        kv_BLC = self._norm_linear(x_BLD, self.norm1, kv_weight, kv_bias)
        out_B1D = attn.norm(attn.attend_first(q_B1D, kv_BLC, tokens))
        x_B1D = self._add(first_B1D, out_B1D, attn.proj, attn.proj_drop, 0, self.drop_path1, FULL)
        return self.add_mlp(x_B1D, FULL)

    def halves(self) -> Halves | None:
        """What ``BlockStack`` may compute in this block's place at inference, or None where its code has to run."""
        attn, mlp, (scale1, scale2) = self.attn, self.mlp, self.scales()
        training = any(part.training for part in (self, attn, mlp, self.drop_path1, self.drop_path2))
        draws = training and max(self._drops(), self.drop_path1.drop_prob, self.drop_path2.drop_prob) > 0.0
        if type(self) not in BLOCKS.values() or draws:
            return None
        between = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
        if not all(isinstance(part, nn.Identity) for part in between) or not untouched(self):
            return None
        norm1, norm2 = (Norm(norm.weight, norm.bias, norm.eps) for norm in (self.norm1, self.norm2))
        proj, fc2 = (Linear(layer.weight, layer.bias) for layer in (attn.proj, mlp.fc2))
        return Halves(
            AttentionHalf(norm1, attn.qkv_layers(), attn.num_heads, attn.head_dim**-0.5, proj, gamma=scale1),
            MlpHalf(norm2, mlp.hidden_layers(), mlp.activation, fc2, gamma=scale2),
            "float" if self.training else self.precision,
        )

    def _drops(self) -> float:
        """The highest probability of dropping one of a token's numbers."""
        return max(self.attn.attn_drop, self.attn.proj_drop, self.mlp.drop)

    def gives_class_token(self, tokens: Tokens) -> bool:
        """Whether ``class_token`` is the same function: no masks, no dropout that draws for every token, nothing watches."""
        return tokens.alike and not (self.training and self._drops() > 0.0) and untouched(self) and not watched(self)

    def add_attention(self, x_BLD: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """x + attention(norm1(x)), and q, k and v [B, L, C] where they passed through here."""
        if not untouched(self):
            branch = self._scale(self.attn(self.norm1(x_BLD), tokens), 0)
            return x_BLD + self.drop_path1(branch, tokens.cu_seqlens), None
        attn = self.attn
        qkv_BLC = self._norm_linear(x_BLD, self.norm1, *attn.qkv_parameters())
        out_BLD = attn.norm(attn.attend(qkv_BLC, tokens))
        x_BLD = self._add(x_BLD, out_BLD, attn.proj, attn.proj_drop, 0, self.drop_path1, tokens)
        return x_BLD, qkv_BLC

    def add_mlp(self, x_BLD: Tensor, tokens: Tokens) -> Tensor:
        """x + mlp(norm2(x))."""
        if not untouched(self):
            return x_BLD + self.drop_path2(self._scale(self.mlp(self.norm2(x_BLD)), 1), tokens.cu_seqlens)
        mlp, norm = self.mlp, self.norm2
        if not mlp.fits_one_op:
            hidden_BLF = mlp.hidden(self._norm_linear(x_BLD, norm, *mlp.hidden_parameters()))
            return self._add(x_BLD, hidden_BLF, mlp.fc2, mlp.drop, 1, self.drop_path2, tokens)
        weight, bias = mlp.hidden_parameters()
        if self._in_int8(x_BLD, weight):
            hidden_BLF = self._int8_norm_linear(x_BLD, norm, weight, bias, mlp.activation)
            return self._add(x_BLD, hidden_BLF, mlp.fc2, mlp.drop, 1, self.drop_path2, tokens)
        return ops.norm_mlp(
            x_BLD,
            norm.weight,
            norm.bias,
            weight,
            bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            norm.eps,
            activation=mlp.activation,
            scale=self.scales()[1],
            drop_path=self.drop_path2.sample(x_BLD, tokens.cu_seqlens),
            recompute=self.recompute,
            backend=self.backend,
        )

    def _in_int8(self, x_BLD: Tensor, weight: Tensor) -> bool:
        if self.precision != "int8" or self.training:
            return False
        if not isinstance(weight if weight._base is None else weight._base, nn.Parameter):
            return False  # made for this call: its integers could not be kept
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_BLD, *self.parameters())))

    def _int8_norm_linear(
        self,
        x_BLD: Tensor,
        norm: LayerNorm,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        """In 16 bits, which are enough for what the next product rounds to 8, and for attention before that."""
        return ops.int8_linear(
            x_BLD,
            weight,
            bias,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            activation=activation,
            dtype=torch.bfloat16 if x_BLD.dtype == torch.float32 else x_BLD.dtype,
            backend=self.backend,
        )

    def _norm_linear(self, x_BLD: Tensor, norm: LayerNorm, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._in_int8(x_BLD, weight):
            return self._int8_norm_linear(x_BLD, norm, weight, bias, "none")
        return ops.norm_linear(
            x_BLD, norm.weight, norm.bias, weight, bias, norm.eps, recompute=self.recompute, backend=self.backend
        )

    def _add(
        self,
        x_BLD: Tensor,
        branch: Tensor,
        linear: nn.Linear,
        drop: float,
        which: int,
        drop_path: DropPath,
        tokens: Tokens,
    ) -> Tensor:
        """x + drop_path * scale * dropout(linear(branch)); the fused op draws no elements (paper, B.1)."""
        scale = self.scales()[which]
        if self.training and drop > 0.0:
            out_BLD = F.dropout(ops.linear(branch, linear.weight, linear.bias), drop)
            return x_BLD + drop_path(out_BLD if scale is None else out_BLD * scale, tokens.cu_seqlens)
        if self._in_int8(x_BLD, linear.weight):
            return ops.int8_linear(
                branch, linear.weight, linear.bias, residual=x_BLD, scale=scale, backend=self.backend
            )
        factor = drop_path.sample(x_BLD, tokens.cu_seqlens)
        return ops.linear_residual(
            x_BLD, branch, linear.weight, linear.bias, scale=scale, drop_path=factor, backend=self.backend
        )


class EvaBlock(Block):
    """The same block with the EVA family's parameter names: LayerScale's factors are ``gamma_1`` and ``gamma_2``."""

    def __init__(
        self, dim: int, num_heads: int, mlp_hidden: int, *, init_values: float | None = None, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, mlp_hidden, **options)
        start = None if init_values is None else torch.full((dim,), float(init_values))
        self.gamma_1 = None if start is None else nn.Parameter(start)
        self.gamma_2 = None if start is None else nn.Parameter(start.clone())

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        return self.gamma_1, self.gamma_2

    def _scale(self, branch_BLD: Tensor, which: int) -> Tensor:
        gamma = self.scales()[which]
        return branch_BLD if gamma is None else branch_BLD * gamma


BLOCKS: dict[str, type[Block]] = {"vit": Block, "eva": EvaBlock}


def _gamma(layer: nn.Module) -> Tensor | None:
    return layer.gamma if isinstance(layer, LayerScale) else None
