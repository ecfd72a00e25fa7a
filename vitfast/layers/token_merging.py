"""Token merging (Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv:2210.09461).

B images, L tokens, R prefix tokens, N = L - R patches, D width, C = 3 * D, H heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast.layers.block import Block, EvaBlock
from vitfast.layers.tokens import FULL, Tokens


def merge_tokens(x_BLD: Tensor, metric_BLE: Tensor, size_BL: Tensor, merge: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Averages the ``merge`` most similar pairs of patches into one token each (section 3, bipartite soft matching).

    Patches are split alternately into two sets; each of the first finds its most similar one of the second by the
    cosine of metric [B, L, E]; the closest ``merge`` pairs become one token, weighted by how many patches each stands
    for, size [B, L]. At most half of the patches merge, the first ``prefix`` tokens never do. Returns (tokens
    [B, L - merge, D], sizes [B, L - merge]): prefix tokens, the first set's remaining tokens in order, the second set.
    On CUDA a token that three or more merge into is summed in no fixed order (``scatter_add``), unless PyTorch's
    deterministic algorithms are on.
    """
    merge = min(merge, (x_BLD.shape[1] - prefix) // 2)
    if merge <= 0:
        return x_BLD, size_BL
    first, second = prefix % 2, (prefix + 1) % 2  # every second token of the whole sequence, as the paper's code splits
    with torch.no_grad():
        metric = F.normalize(metric_BLE[:, prefix:], dim=-1)
        similarity, partner = (metric[:, first::2] @ metric[:, second::2].transpose(1, 2)).max(dim=-1)
        order = similarity.argsort(dim=-1, descending=True)
        merged, kept = order[:, :merge], order[:, merge:].sort(dim=-1).values
        target = partner.gather(1, merged)

    def combine(y_BNX: Tensor) -> Tensor:
        """Prefix, kept, second set with the merged ones added to it."""
        start, patches = y_BNX.tensor_split([prefix], dim=1)
        width = (-1, -1, patches.shape[-1])
        sources, targets = patches[:, first::2], patches[:, second::2]
        moved = sources.gather(1, merged.unsqueeze(-1).expand(width))
        targets = targets.scatter_add(1, target.unsqueeze(-1).expand(width), moved)
        return torch.cat([start, sources.gather(1, kept.unsqueeze(-1).expand(width)), targets], dim=1)

    size = combine(size_BL.unsqueeze(-1))
    weighted = combine(x_BLD * size_BL.unsqueeze(-1).to(x_BLD.dtype))
    return weighted / size.to(x_BLD.dtype), size.squeeze(-1)


class MergingBlock(Block):
    """A block that merges tokens between attention and perceptron; similarity is that of the keys, averaged over heads.

    ``forward`` returns (tokens [B, L - merge, D], Tokens with the new sizes). Attention counts a token as often as it
    has patches (equation 1).
    """

    def __init__(self, *args: Any, merge: int, prefix: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.merge = merge
        self.prefix = prefix

    def forward(self, x_BLD: Tensor, tokens: Tokens = FULL) -> tuple[Tensor, Tokens]:  # type: ignore[override]
        if tokens.size is None:
            tokens = tokens._replace(size=torch.ones(x_BLD.shape[:2], device=x_BLD.device))
        after_BLD, qkv_BLC = self.add_attention(x_BLD, tokens)
        if qkv_BLC is None:  # it ran inside a sub-module that has hooks or was replaced
            qkv_BLC = self.attn.project(self.norm1(x_BLD))
        heads = (3, self.attn.num_heads, self.attn.head_dim)
        keys_BLHE = self.attn.k_norm(qkv_BLC.detach().unflatten(-1, heads)[:, :, 1])
        assert tokens.size is not None
        merged_BLD, size = merge_tokens(after_BLD, keys_BLHE.float().mean(dim=2), tokens.size, self.merge, self.prefix)
        tokens = tokens._replace(size=size)
        return self.add_mlp(merged_BLD, tokens), tokens


class MergingEvaBlock(MergingBlock, EvaBlock):
    """The same with the EVA family's parameter names."""


MERGING_BLOCKS: dict[str, type[MergingBlock]] = {"vit": MergingBlock, "eva": MergingEvaBlock}
