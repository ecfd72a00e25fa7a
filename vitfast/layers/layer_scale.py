"""LayerScale: one learned factor per channel on a residual branch (Touvron et al. 2021, "Going deeper with ViTs").

D width.
"""

import torch
from torch import nn


class LayerScale(nn.Module):
    """Multiplies the last dimension by ``gamma`` [D], which starts at ``init_values``."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma
