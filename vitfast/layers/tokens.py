"""What blocks are told of their tokens beside the values: positions, masks, where packed images start.

B images, L tokens, N patches, H heads, E head dim, S packed images, T tokens of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitfast import ops
from vitfast.ops.heads import full_table, quarter_turn


class Rope(NamedTuple):
    """Rotary tables of the last N tokens, fp32, ready to multiply.

    cos, sin: [N, E / 2] for every image and head (or [T, E / 2] for all tokens of a packed batch); otherwise [..., N, H or 1, E].
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
            E = 2 * self.cos.shape[-1]
            cos, sin = (full_table(table, E, self.interleaved) for table in (self.cos, self.sin))  # [N, 1, E]
            return self._replace(cos=cos[kept_BK], sin=sin[kept_BK])
        return self._replace(cos=self.cos[..., kept_BK, :, :], sin=self.sin[..., kept_BK, :, :])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the last N tokens of x [..., L, H, E] (Su et al. 2021, arXiv:2104.09864); the others stay."""
        if self.shared:
            return ops.Rope(*self)(x)
        prefix, patches = x.split([x.shape[-3] - self.cos.shape[-3], self.cos.shape[-3]], -3)
        turned = patches * self.cos + quarter_turn(patches, self.interleaved) * self.sin
        return torch.cat([prefix, turned.to(x.dtype)], -3)


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

    @property
    def plain(self) -> bool:
        """Nothing to tell."""
        return all(entry is None for entry in self)

    @property
    def alike(self) -> bool:
        """Nothing to tell, or rotations that all images and heads share."""
        return self._replace(rope=None).plain and (self.rope is None or self.rope.shared)

    def visible_bias(self, like: Tensor) -> Tensor | None:
        """``bias`` and ``size`` as one bias in the dtype of ``like``; None without either."""
        if self.size is None:
            return self.bias
        log_size = self.size.log()[:, None, None, :].to(like.dtype)  # a token counts as often as it has patches
        return log_size if self.bias is None else self.bias + log_size

    def full_bias(self, like: Tensor) -> Tensor | None:
        """``visible_bias`` with ``padding`` in it, for attention in plain PyTorch."""
        bias = self.visible_bias(like)
        if self.padding is None:
            return bias
        hidden = additive(~self.padding[:, None, None, :], like)
        return hidden if bias is None else bias + hidden

    def block_diagonal(self, like: Tensor) -> Tensor:
        """A packed batch's bias [T, T]: 0 within an image, -inf between images."""
        assert self.cu_seqlens is not None
        image_T = torch.searchsorted(self.cu_seqlens, torch.arange(like.shape[0], device=like.device), right=True)
        return additive(image_T[:, None] == image_T[None, :], like)


FULL = Tokens()


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """A bool mask (True: may be seen) as something to add to the logits, in the dtype of ``like``."""
    return torch.zeros(visible.shape, dtype=like.dtype, device=visible.device).masked_fill(~visible, -torch.inf)
