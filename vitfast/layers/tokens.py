"""What blocks are told of their tokens beside the values: positions, masks, where packed images start.

B images, L tokens, N patches, H heads, E head dim, S packed images, T tokens of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """Rotary tables of the last N tokens, fp32, ready to multiply.

    cos, sin: [N, E] for every image and head (or [T, E] for all tokens of a packed batch); otherwise [..., N, H or 1, E].
    interleaved: element 2i is paired with 2i + 1; otherwise element i with i + E / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @property
    def shared(self) -> bool:
        """One table for every image and head."""
        return self.cos.ndim == 2

    def layer(self, index: int) -> Rope:
        """One layer's tables out of those of all layers [layers, ...]."""
        return self._replace(cos=self.cos[index], sin=self.sin[index])

    def take(self, kept_BK: Tensor) -> Rope:
        """The tables of each image's kept patches: [B, K, H or 1, E], of all layers [layers, B, K, H, E]."""
        if self.shared:
            return self._replace(cos=self.cos[kept_BK].unsqueeze(2), sin=self.sin[kept_BK].unsqueeze(2))
        return self._replace(cos=self.cos[..., kept_BK, :, :], sin=self.sin[..., kept_BK, :, :])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the last N tokens of x [..., L, H, E] (Su et al. 2021, arXiv:2104.09864); the others stay."""
        cos, sin = (table.unsqueeze(1) if self.shared else table for table in (self.cos, self.sin))
        prefix, patches = x.split([x.shape[-3] - cos.shape[-3], cos.shape[-3]], -3)
        if self.interleaved:
            pairs = patches.unflatten(-1, (-1, 2))
            turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
        else:
            first, second = patches.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        return torch.cat([prefix, (patches * cos + turned * sin).to(x.dtype)], -3)


class Tokens(NamedTuple):
    """Everything None: each token of an image sees all of that image's tokens.

    rope: rotary tables.
    bias: added to the attention logits, broadcasts to [B, H, L, L].
    padding: bool [B, L], True for tokens that are padding: no token sees them and no pooling counts them.
    cu_seqlens: int32 [S + 1], where each image of a packed batch [T, D] starts, with max_seqlen the longest one.
    size: [B, L], how many patches each token stands for, where tokens are merged.
    """

    rope: Rope | None = None
    bias: Tensor | None = None
    padding: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    size: Tensor | None = None

    def full_bias(self, like: Tensor) -> Tensor | None:
        """``bias``, ``padding`` and ``size`` as one bias in the dtype of ``like``; None without any of them."""
        bias = self.bias
        if self.size is not None:  # proportional attention: a token counts as often as it has patches
            log_size = self.size.log()[:, None, None, :].to(like.dtype)
            bias = log_size if bias is None else bias + log_size
        if self.padding is not None:
            hidden = additive(~self.padding[:, None, None, :], like)
            bias = hidden if bias is None else bias + hidden
        return bias

    def block_diagonal(self, like: Tensor) -> Tensor:
        """A packed batch's bias [T, T]: 0 within an image, -inf between images."""
        assert self.cu_seqlens is not None
        image_T = torch.searchsorted(self.cu_seqlens, torch.arange(like.shape[0], device=like.device), right=True)
        return additive(image_T[:, None] == image_T[None, :], like)


FULL = Tokens()


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """A bool mask (True: may be seen) as something to add to the logits, in the dtype of ``like``."""
    return torch.zeros(visible.shape, dtype=like.dtype, device=visible.device).masked_fill(~visible, -torch.inf)
