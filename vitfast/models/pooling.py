"""From an image's tokens to one vector.

B images, N tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pool_tokens(x_BND: Tensor, kind: str, padding_BN: Tensor | None, size_BN: Tensor | None) -> Tensor:
    """Mean, maximum or the mean of both over the tokens that are no padding, [B, D].

    kind: "avg", "max" or "avgmax". size_BN: how many patches each token stands for; the mean is over patches.
    """
    if kind == "max":
        return _maximum(x_BND, padding_BN)
    mean = _mean(x_BND, padding_BN, size_BN)
    return mean if kind == "avg" else 0.5 * (_maximum(x_BND, padding_BN) + mean)


def _maximum(x_BND: Tensor, padding_BN: Tensor | None) -> Tensor:
    if padding_BN is not None:
        x_BND = x_BND.masked_fill(padding_BN.unsqueeze(-1), -torch.inf)
    return x_BND.amax(dim=1)


def _mean(x_BND: Tensor, padding_BN: Tensor | None, size_BN: Tensor | None) -> Tensor:
    if padding_BN is None and size_BN is None:
        return x_BND.mean(dim=1)
    weight_BN = torch.ones(x_BND.shape[:2], device=x_BND.device) if size_BN is None else size_BN
    if padding_BN is not None:
        weight_BN = weight_BN.masked_fill(padding_BN, 0.0)
        x_BND = x_BND.masked_fill(padding_BN.unsqueeze(-1), 0.0)
    weight_BN = (weight_BN / weight_BN.sum(dim=1, keepdim=True)).to(x_BND.dtype)
    return (x_BND * weight_BN.unsqueeze(-1)).sum(dim=1)
