"""The block's two-layer perceptron.

D width, F mlp hidden.
"""

import torch
from torch import nn

from vitfast import ops


class Mlp(nn.Module):
    """fc2(activation(fc1(x))) over the last dimension, D -> F -> D; activation is "gelu", "gelu_tanh" or "quick_gelu"."""

    def __init__(self, dim: int, hidden: int, *, activation: str = "gelu", backend: str = "auto") -> None:
        super().__init__()
        self.activation = activation
        self.backend = backend
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            activation=self.activation,
            backend=self.backend,
        )
