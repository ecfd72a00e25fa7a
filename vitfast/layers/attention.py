"""Multi-head self-attention with one packed qkv projection.

B images, L tokens, D width, H heads, E head dim.
"""

import torch
from torch import nn

from vitfast import ops


class Attention(nn.Module):
    """Projection to q, k and v, softmax attention, output projection (Vaswani et al. 2017; Dosovitskiy et al. 2021, A).

    ``Block`` fuses the two projections with their neighbours and so calls ``attend`` and the weights directly.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, backend: str = "auto") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the width, got num_heads={num_heads} and width {dim}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, qkv_BLC: torch.Tensor) -> torch.Tensor:
        """Attention on the qkv projection's output [B, L, 3 * D], to [B, L, D], both packed as timm packs them."""
        qkv_BL3HE = qkv_BLC.unflatten(-1, (3, self.num_heads, self.head_dim))
        return ops.attention(qkv_BL3HE, backend=self.backend).flatten(2)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        qkv_BLC = ops.linear(x_BLD, self.qkv.weight, self.qkv.bias)
        return ops.linear(self.attend(qkv_BLC), self.proj.weight, self.proj.bias)
