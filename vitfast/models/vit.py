"""The Vision Transformer (Dosovitskiy et al. 2021), with timm's parameter and method names.

B images, C channels, Hi x Wi pixels, N patches, R prefix tokens (class and registers), L = R + N tokens, D width,
K classes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitfast.layers.attention_pool import AttentionPoolLatent
from vitfast.layers.block import Block
from vitfast.layers.drop_path import drop_path_rates
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.patch_embed import PatchEmbed
from vitfast.models.config import POOLINGS, ViTConfig, check_choice, per_channel


class VisionTransformer(nn.Module):
    """images [B, C, Hi, Wi] -> patch embedding -> blocks -> norm -> pool -> head -> logits [B, K].

    With ``config.normalize`` the images are raw pixels (uint8 0..255 or float 0..1), otherwise normalised floats. With
    num_classes = 0 the model returns the pooled features [B, D], with global_pool = "" every token [B, L, ...].
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        self.num_prefix_tokens = config.num_prefix_tokens
        self.num_features = self.embed_dim = config.embed_dim
        self.recompute = config.recompute
        dim, backend = config.embed_dim, config.backend

        self.patch_embed = PatchEmbed(
            config.image_hw,
            config.patch_size,
            config.in_chans,
            dim,
            bias=not config.pre_norm,
            mean=per_channel(config.mean, config.in_chans) if config.normalize else None,
            std=per_channel(config.std, config.in_chans) if config.normalize else None,
            backend=backend,
        )
        embed_len = self.patch_embed.num_patches + (0 if config.no_embed_class else self.num_prefix_tokens)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, embed_len, dim))
        self.norm_pre = self._norm() if config.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(
            *[
                Block(
                    dim,
                    config.num_heads,
                    config.mlp_hidden,
                    qkv_bias=config.qkv_bias,
                    activation=config.activation,
                    norm_eps=config.norm_eps,
                    init_values=config.init_values,
                    proj_drop=config.proj_drop_rate,
                    drop_path=drop_path,
                    backend=backend,
                    recompute=config.block_recompute,
                )
                for drop_path in drop_path_rates(config.drop_path_rate, config.depth)
            ]
        )
        self.norm = nn.Identity() if config.norm_after_pool else self._norm()
        self.attn_pool = (
            AttentionPoolLatent(
                dim,
                config.num_heads,
                config.mlp_hidden,
                activation=config.activation,
                norm_eps=config.norm_eps,
                backend=backend,
            )
            if config.global_pool == "map"
            else None
        )
        self.fc_norm = self._norm() if config.norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        hidden = config.representation_size
        self.pre_logits = _representation(dim, hidden) if hidden is not None else nn.Identity()
        self.head = nn.Linear(hidden or dim, self.num_classes) if self.num_classes else nn.Identity()
        self.init_weights()

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.config.embed_dim, self.config.norm_eps, backend=self.config.backend)

    @torch.no_grad()
    def init_weights(self) -> None:
        """timm's start: truncated normal (std 0.02) for linear weights and positions, zero biases, tokens near zero."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """All tokens after the last block and the final norm, [B, L, D]; the first R are class and registers."""
        x_BLD = self.embed(images_BCHW)
        for block in self.blocks:
            x_BLD = self._run(block, x_BLD)
        return self.norm(x_BLD)

    def forward_head(self, x_BLD: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens [B, L, D] to logits [B, K], or to what the head sees with ``pre_logits=True``."""
        x_BD = self.pre_logits(self.head_drop(self.fc_norm(self.pool(x_BLD))))
        return x_BD if pre_logits else self.head(x_BD)

    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Images to the first block's input [B, L, D]: patches, positions, prefix tokens, dropout, norm_pre."""
        tokens: list[torch.Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix_1RD = torch.cat(tokens, dim=1) if tokens else None
        x_BLD = self.patch_embed(images_BCHW, self.pos_embed, prefix_1RD)
        return self.norm_pre(F.dropout(x_BLD, self.config.pos_drop_rate, self.training))

    def _run(self, block: nn.Module, x_BLD: torch.Tensor) -> torch.Tensor:
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(block, x_BLD, use_reentrant=False)  # keeps x and the RNG state, nothing inside
        return block(x_BLD)

    def pool(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, D] to one vector per image [B, D]; with global_pool = "" the tokens as they are."""
        patches_BND = x_BLD[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(patches_BND)
        if self.global_pool == "token":
            return x_BLD[:, 0]
        if self.global_pool == "avg":
            return patches_BND.mean(dim=1)
        if self.global_pool == "max":
            return patches_BND.amax(dim=1)
        if self.global_pool == "avgmax":
            return 0.5 * (patches_BND.amax(dim=1) + patches_BND.mean(dim=1))
        return x_BLD

    def forward_intermediates(
        self,
        images_BCHW: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen blocks, as timm gives them.

        indices: the last n blocks (int), these blocks (a sequence, negative from the end), or all (None).
        norm: apply the final norm to each. stop_early: run no block after the last chosen one.
        output_fmt: "NCHW" for maps [B, D, rows, columns] or "NLC" for tokens [B, N, D].
        Returns (final tokens, list), or the list alone with intermediates_only; each entry becomes a pair (patches,
        prefix tokens [B, R, D]) with return_prefix_tokens. Raises ValueError for an index without a block.
        """
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        chosen = _block_indices(len(self.blocks), indices)
        x_BLD = self.embed(images_BCHW)
        outputs = {}
        for i, block in enumerate(self.blocks):
            if stop_early and i > max(chosen):
                break
            x_BLD = self._run(block, x_BLD)
            if i in chosen:
                outputs[i] = self.norm(x_BLD) if norm else x_BLD
        prefixes = [outputs[i][:, : self.num_prefix_tokens] for i in chosen]
        patches = [outputs[i][:, self.num_prefix_tokens :] for i in chosen]
        if output_fmt == "NCHW":
            grid = self.patch_embed.grid_size
            patches = [y_BND.transpose(1, 2).unflatten(2, grid).contiguous() for y_BND in patches]
        pairs = return_prefix_tokens and self.num_prefix_tokens > 0
        intermediates: list = list(zip(patches, prefixes, strict=True)) if pairs else patches
        return intermediates if intermediates_only else (self.norm(x_BLD), intermediates)

    def get_intermediate_layers(
        self,
        images_BCHW: torch.Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list:
        """DINO's interface to ``forward_intermediates``: the last n blocks or the blocks n, as tokens or maps."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            images_BCHW, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True
        )

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the whole head, tanh layer included, by one zero-initialised linear (Dosovitskiy et al., B.1.1).

        num_classes = 0 leaves none. global_pool, if given, changes the pooling; attention pooling can be removed
        but not added. The final norm stays where it is. Raises ValueError.
        """
        if global_pool is not None:
            check_choice("global_pool", global_pool, POOLINGS)
            if global_pool == "token" and self.cls_token is None:
                raise ValueError("global_pool='token' needs a class token, and this model has none")
            if global_pool == "map" and self.attn_pool is None:
                raise ValueError("global_pool='map' cannot be added here; create the model with it")
            if global_pool != "map":
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.pre_logits = nn.Identity()
        self.head = nn.Identity()
        if num_classes:
            like = self.pos_embed
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's switch: recompute "block" when enabled, otherwise only what the blocks recompute by themselves."""
        self.recompute = "block" if enable else self.config.block_recompute

    def no_weight_decay(self) -> set[str]:
        """Parameters that optimizers should not decay, beside biases and norms."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns for layer-wise learning rates: the stem, then each block; ``coarse`` changes nothing here."""
        stem = r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def _representation(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc=nn.Linear(dim, hidden), act=nn.Tanh()))


def _block_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    """Block numbers from 0 for ``forward_intermediates``'s indices."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"indices must be between 1 and the number of blocks {depth}, got {indices}")
        return list(range(depth - indices, depth))
    chosen = [depth + i if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < depth for i in chosen):
        raise ValueError(f"indices must name blocks of 0..{depth - 1} (or negative), got {list(indices)}")
    return chosen
