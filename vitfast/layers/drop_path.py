"""Stochastic depth: drop a residual branch for whole samples (Huang et al. 2016).

B images, ... the remaining dimensions of a branch; a packed batch is [T, D] with S images.
"""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Keeps each sample's branch with probability 1 - drop_prob and scales what is kept by its inverse.

    ``sample`` draws the per-sample factor that the fused ops take; calling the module applies one to a branch. With
    ``cu_seqlens`` [S + 1] a sample is an image of a packed batch.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_prob must be in [0, 1), got {drop_prob}")
        self.drop_prob = drop_prob

    def sample(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor | None:
        """A factor of 0 or 1 / (1 - drop_prob) for each row x[i], fp32 [B] (or [T]); None when nothing drops."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        samples = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        factor = torch.empty(samples, device=x.device, dtype=torch.float32).bernoulli_(keep_prob).div_(keep_prob)
        if cu_seqlens is None:
            return factor
        return factor.repeat_interleave(cu_seqlens.diff(), output_size=x.shape[0])

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        factor_B = self.sample(x, cu_seqlens)
        return x if factor_B is None else x * factor_B.to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """One drop probability per block, growing linearly from 0 at the first block to ``rate`` at the last."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]
