"""Layer normalisation as a module (Ba et al. 2016)."""

import torch
from torch import nn

from vitfast import ops


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last dimension, run by ``ops.layer_norm``; eps defaults to the ViT's 1e-6."""

    def __init__(self, dim: int, eps: float = 1e-6, *, backend: str = "auto") -> None:
        super().__init__(dim, eps=eps)
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
