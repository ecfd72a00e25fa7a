"""Multi-head attention pooling (MAP): one learned query gathers an image's tokens.

B images, L tokens, D width, H heads, E head dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vitfast import ops
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.mlp import Mlp


class AttentionPoolLatent(nn.Module):
    """SigLIP's pooling head (Zhai et al. 2022, "Scaling Vision Transformers", section 3.2), timm's parameter names.

    The one query makes attention here a matrix-vector product per head, so plain PyTorch runs it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_hidden: int,
        *,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, norm_eps, backend=backend)
        self.mlp = Mlp(dim, mlp_hidden, activation=activation, backend=backend)
        nn.init.trunc_normal_(self.latent, std=dim**-0.5)

    def forward(self, x_BLD: torch.Tensor, bias_BL: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, L, D] to one vector per image, [B, D]; bias is added to each token's logit."""
        heads = (self.num_heads, self.head_dim)
        q_1H1E = self.q(self.latent).unflatten(-1, heads).transpose(1, 2)
        kv_BLC = ops.linear(x_BLD, self.kv.weight, self.kv.bias)
        k_BHLE, v_BHLE = kv_BLC.unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        q_BH1E = q_1H1E.expand(x_BLD.shape[0], -1, -1, -1)
        mask = None if bias_BL is None else bias_BL[:, None, None, :].to(q_BH1E.dtype)
        pooled_BH1E = F.scaled_dot_product_attention(q_BH1E, k_BHLE, v_BHLE, attn_mask=mask)
        pooled_BD = self.proj(pooled_BH1E.flatten(1))
        return pooled_BD + self.mlp(self.norm(pooled_BD))
