"""The block's perceptron, plain or gated.

D width, F hidden width (of a gated one: of each half).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import ops
from vitfast.layers.halves import Linear
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.untouched import remember_parts, untouched
from vitfast.ops.compose import activation_ref


class Mlp(nn.Module):
    """fc2(norm(activation(fc1(x)))) over the last dimension, D -> F -> D.

    activation: "gelu", "gelu_tanh", "quick_gelu" or "swiglu", whose fc1 has 2 F outputs, the gate first (Shazeer 2020,
    arXiv:2002.05202). scale_norm: a LayerNorm before fc2. drop: dropout after the activation and after fc2.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.drop = drop
        self.backend = backend
        self._make_hidden(dim, hidden)
        self.norm = LayerNorm(hidden, norm_eps, backend=backend) if scale_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)
        remember_parts(self)

    def _make_hidden(self, dim: int, hidden: int) -> None:
        self.fc1 = nn.Linear(dim, 2 * hidden if self.activation == "swiglu" else hidden)

    def hidden_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first product in one: [F, D] and [F], gated [2 F, D] and [2 F]."""
        return self.fc1.weight, self.fc1.bias

    def hidden_layers(self) -> tuple[Linear, ...]:
        """The first product's parameters where they are: one layer, or the gate's and the value's."""
        return (Linear(self.fc1.weight, self.fc1.bias),)

    def project(self, x: Tensor) -> Tensor:
        """The first product by calling the sub-modules, whatever they have become."""
        return self.fc1(x)

    @property
    def fits_one_op(self) -> bool:
        """Whether ``ops.mlp`` computes all of it: nothing between the activation and fc2, and no dropout now."""
        return isinstance(self.norm, nn.Identity) and not (self.training and self.drop > 0.0)

    def hidden(self, h: Tensor) -> Tensor:
        """Activation, dropout and norm of the first product, [..., F]."""
        return self.norm(F.dropout(activation_ref(h, self.activation), self.drop, self.training))

    def forward(self, x: Tensor) -> Tensor:
        fused = untouched(self)
        if fused and self.fits_one_op:
            return ops.mlp(
                x,
                *self.hidden_parameters(),
                self.fc2.weight,
                self.fc2.bias,
                activation=self.activation,
                backend=self.backend,
            )
        hidden = self.hidden(ops.linear(x, *self.hidden_parameters()) if fused else self.project(x))
        out = ops.linear(hidden, self.fc2.weight, self.fc2.bias) if fused else self.fc2(hidden)
        return F.dropout(out, self.drop, self.training)


class SwiGLU(Mlp):
    """The gated perceptron with separate parameters for the gate and the value, as EVA-02 and DINOv3 store them."""

    def _make_hidden(self, dim: int, hidden: int) -> None:
        self.fc1_g = nn.Linear(dim, hidden)
        self.fc1_x = nn.Linear(dim, hidden)

    def hidden_parameters(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.fc1_g.weight, self.fc1_x.weight]), torch.cat([self.fc1_g.bias, self.fc1_x.bias])

    def hidden_layers(self) -> tuple[Linear, ...]:
        return tuple(Linear(layer.weight, layer.bias) for layer in (self.fc1_g, self.fc1_x))

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([self.fc1_g(x), self.fc1_x(x)], -1)
