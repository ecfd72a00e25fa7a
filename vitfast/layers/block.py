"""One pre-norm transformer block in four ops.

B images, L tokens, D width, C = 3 * D, F mlp hidden.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitfast import ops
from vitfast.layers.attention import Attention
from vitfast.layers.drop_path import DropPath
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.layer_scale import LayerScale
from vitfast.layers.mlp import Mlp
from vitfast.ops.compose import activation_ref


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)) (Dosovitskiy et al. 2021, equations 2 and 3).

    ``init_values`` turns LayerScale on, ``drop_path`` drops whole branches per sample, ``proj_drop`` is the dropout
    after proj, fc1 and fc2. ``recompute`` is "none", "fused" or "mlp" (see ``ops.norm_mlp``).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        qkv_bias: bool = True,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        recompute: str = "fused",
    ) -> None:
        super().__init__()
        self.backend = backend
        self.recompute = recompute
        self.proj_drop = proj_drop
        self.norm1 = LayerNorm(dim, norm_eps, backend=backend)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, backend=backend)
        self.ls1 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(dim, norm_eps, backend=backend)
        self.mlp = Mlp(dim, mlp_hidden, activation=activation, backend=backend)
        self.ls2 = LayerScale(dim, init_values) if init_values is not None else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        if self.training and self.proj_drop > 0.0:
            return self._forward_with_dropout(x_BLD)
        out_BLD = self.attn.attend(self._norm_linear(x_BLD, self.norm1, self.attn.qkv))
        x_BLD = ops.linear_residual(
            x_BLD,
            out_BLD,
            self.attn.proj.weight,
            self.attn.proj.bias,
            scale=_gamma(self.ls1),
            drop_path=self.drop_path1.sample(x_BLD),
            backend=self.backend,
        )
        return ops.norm_mlp(
            x_BLD,
            self.norm2.weight,
            self.norm2.bias,
            self.mlp.fc1.weight,
            self.mlp.fc1.bias,
            self.mlp.fc2.weight,
            self.mlp.fc2.bias,
            self.norm2.eps,
            activation=self.mlp.activation,
            scale=_gamma(self.ls2),
            drop_path=self.drop_path2.sample(x_BLD),
            recompute=self.recompute,
            backend=self.backend,
        )

    def _norm_linear(self, x_BLD: torch.Tensor, norm: LayerNorm, linear: nn.Linear) -> torch.Tensor:
        return ops.norm_linear(
            x_BLD,
            norm.weight,
            norm.bias,
            linear.weight,
            linear.bias,
            norm.eps,
            recompute=self.recompute,
            backend=self.backend,
        )

    def _forward_with_dropout(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """The same block with dropout after every dense layer but qkv (paper, B.1): the fused ops draw no elements."""
        proj, fc2 = self.attn.proj, self.mlp.fc2
        out_BLD = self.attn.attend(self._norm_linear(x_BLD, self.norm1, self.attn.qkv))
        out_BLD = F.dropout(ops.linear(out_BLD, proj.weight, proj.bias), self.proj_drop)
        x_BLD = x_BLD + self.drop_path1(self.ls1(out_BLD))
        hidden_BLF = self._norm_linear(x_BLD, self.norm2, self.mlp.fc1)
        hidden_BLF = F.dropout(activation_ref(hidden_BLF, self.mlp.activation), self.proj_drop)
        out_BLD = F.dropout(ops.linear(hidden_BLF, fc2.weight, fc2.bias), self.proj_drop)
        return x_BLD + self.drop_path2(self.ls2(out_BLD))


def _gamma(layer: nn.Module) -> torch.Tensor | None:
    return layer.gamma if isinstance(layer, LayerScale) else None
