"""Patch dropout: train on a random part of each image's patches (Liu et al. 2022, arXiv:2208.07220).

B images, L tokens, R prefix tokens, N patches, K kept patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """In training keeps K = max(1, int(N * (1 - rate))) random patches of each image; prefix tokens stay."""

    def __init__(self, rate: float, num_prefix_tokens: int) -> None:
        super().__init__()
        self.rate = rate
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """(tokens [B, R + K, D], numbers of the kept patches [B, K]; None when all are)."""
        if not self.training or self.rate == 0.0:
            return x_BLD, None
        prefix, patches_BND = x_BLD.tensor_split([self.num_prefix_tokens], dim=1)
        B, N, D = patches_BND.shape
        keep = max(1, int(N * (1.0 - self.rate)))
        kept_BK = torch.randn(B, N, device=x_BLD.device).argsort(dim=-1)[:, :keep]
        patches = patches_BND.gather(1, kept_BK.unsqueeze(-1).expand(-1, -1, D))
        return torch.cat([prefix, patches], dim=1), kept_BK

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
