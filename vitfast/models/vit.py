"""The Vision Transformer (Dosovitskiy et al. 2021), with timm's parameter and method names.

B images, C channels, Hi x Wi pixels, N patches, R prefix tokens (class and registers), L = R + N tokens, D width,
K classes.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfast import ops
from vitfast.layers.attention_pool import AttentionPoolLatent
from vitfast.layers.block import BLOCKS, Block
from vitfast.layers.drop_path import drop_path_rates
from vitfast.layers.halves import Halves
from vitfast.layers.layer_norm import LayerNorm
from vitfast.layers.patch_dropout import PatchDropout
from vitfast.layers.patch_embed import PatchEmbed
from vitfast.layers.resample import resample_pos_embed
from vitfast.layers.rope import RotaryEmbedding
from vitfast.layers.stack import BlockStack
from vitfast.layers.token_merging import MERGING_BLOCKS
from vitfast.layers.tokens import FULL, Tokens, additive
from vitfast.layers.untouched import watched
from vitfast.models import intermediates, packed, surgery
from vitfast.models.config import ViTConfig, per_channel
from vitfast.models.pooling import pool_tokens


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
        self.num_features = self.head_hidden_size = self.embed_dim = config.embed_dim
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
            dynamic=config.dynamic_img_size,
            pad=config.dynamic_img_pad,
            backend=backend,
        )
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        embed_len = self.num_embedded_prefix_tokens + self.patch_embed.num_patches
        learned = config.pos_embed == "learn"
        self.pos_embed: nn.Parameter | None = nn.Parameter(torch.empty(1, embed_len, dim)) if learned else None
        self.patch_drop = PatchDropout(config.patch_drop_rate, self.num_prefix_tokens)
        self.rope = _rotary_embedding(config)
        self.norm_pre: nn.Module = self._norm() if config.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*_blocks(config))
        self._stack = BlockStack()
        self.norm: nn.Module = self._norm() if config.final_norm and not config.norm_after_pool else nn.Identity()
        self.attn_pool: AttentionPoolLatent | None = (
            AttentionPoolLatent(
                dim,
                config.attn_pool_num_heads or config.num_heads,
                int(dim * (config.attn_pool_mlp_ratio or config.mlp_ratio)),
                activation="gelu" if config.block == "eva" else config.activation,
                norm_eps=config.norm_eps,
                backend=backend,
            )
            if config.global_pool == "map"
            else None
        )
        self.fc_norm: nn.Module = self._norm() if config.final_norm and config.norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(config.drop_rate)
        hidden = config.representation_size
        self.pre_logits: nn.Module = _representation(dim, hidden) if hidden is not None else nn.Identity()
        self.head: nn.Module = nn.Linear(hidden or dim, self.num_classes) if self.num_classes else nn.Identity()
        self.init_weights()

    @property
    def num_embedded_prefix_tokens(self) -> int:
        """Class and register tokens that have position embeddings of their own."""
        return 0 if self.config.no_embed_class else self.num_prefix_tokens

    def _norm(self) -> LayerNorm:
        return LayerNorm(self.config.embed_dim, self.config.norm_eps, backend=self.config.backend)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VisionTransformer:
        # .to(), .half(), .cuda() under torch.inference_mode: parameters stay ordinary ones, as create_model makes them.
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    @torch.no_grad()
    def init_weights(self) -> None:
        """timm's start: truncated normal (std 0.02) for linear weights and positions, zero biases, tokens near zero.

        With an "eva" block, as its family: tokens like positions, each branch's last layer over sqrt(2 * its depth), and
        a head a thousandth as large.
        """
        eva = self.config.block == "eva"
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02) if eva else nn.init.normal_(token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if eva:
            for depth, block in enumerate(self.blocks, start=1):
                for linear in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
                    linear.weight.div_(math.sqrt(2.0 * depth))  # type: ignore[union-attr, operator]
            if isinstance(self.head, nn.Linear):
                self.head.weight.mul_(0.001)

    def forward(
        self, images_BCHW: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, K].

        attn_mask: broadcasts to [B, H, L, L]; bool (True: may be seen) or a float added to the logits.
        key_padding_mask: bool [B, N] or [B, L], True for patches that are padding: no token attends to them and they
            do not count in the pooling. As in ``torch.nn.MultiheadAttention``.
        Raises ValueError for images or masks that do not fit.
        """
        x_BLD, tokens = self._features(images_BCHW, attn_mask, key_padding_mask, for_head=True)
        return self._head(x_BLD, tokens)

    def forward_features(
        self, images_BCHW: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """All tokens after the last block and the final norm, [B, L, D]; the first R are class and registers."""
        return self._features(images_BCHW, attn_mask, key_padding_mask)[0]

    def forward_head(self, x_BLD: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, D] to logits [B, K], or to what the head sees with ``pre_logits=True``."""
        return self._head(x_BLD, FULL, pre_logits)

    def _features(
        self,
        images_BCHW: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        *,
        for_head: bool = False,
    ) -> tuple[Tensor, Tokens]:
        """Tokens after the final norm; ``for_head``: the class token alone [B, 1, D] where the head reads no other."""
        x_BLD, tokens = self.start(images_BCHW, attn_mask, key_padding_mask)
        blocks: list[Any] = list(self.blocks)
        enough = for_head and bool(blocks) and self._class_token_is_enough(blocks[-1], tokens)
        if tokens.alike and not watched(self.blocks):
            rope, describe = None if tokens.rope is None else ops.Rope(*tokens.rope), partial(_halves, blocks)
            together = self._stack.run(blocks, x_BLD, describe, self.config.backend, rope=rope, first_token=enough)
            if together is not None:
                return self.norm(together), tokens
        for i, block in enumerate(blocks):
            last = enough and i == len(blocks) - 1
            x_BLD, tokens = self.run_block(i, block.class_token if last else block, x_BLD, tokens)
        return self.norm(x_BLD), tokens

    def _class_token_is_enough(self, block: Any, tokens: Tokens) -> bool:
        reads_one = self.global_pool == "token" and self.attn_pool is None and not watched(self.norm)
        return reads_one and type(block) in BLOCKS.values() and block.gives_class_token(tokens)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Images to the first block's input [B, L, D]: patches, positions, prefix tokens, dropout, norm_pre."""
        return self.start(images_BCHW)[0]

    def start(
        self,
        images_BCHW: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        *,
        any_size: bool = False,
    ) -> tuple[Tensor, Tokens]:
        """The first block's input [B, L, D], and what the blocks are told about these tokens.

        any_size: take images of any size for this call, as with dynamic_img_size.
        """
        grid = self.patch_embed.grid_of(images_BCHW, any_size=any_size)
        rope = None if self.rope is None else self.rope(grid, images_BCHW.device)
        x_BLD = self.patch_embed(images_BCHW, self.positions(grid), self._prefix(), any_size=any_size)
        x_BLD, kept_BK = self.patch_drop(F.dropout(x_BLD, self.config.pos_drop_rate, self.training))
        if rope is not None and kept_BK is not None:
            rope = rope.take(kept_BK)
        if attn_mask is not None and kept_BK is not None:
            raise ValueError("attn_mask does not go with patch_drop_rate in training: each image keeps other patches")
        bias = None
        if attn_mask is not None:
            bias = additive(attn_mask, x_BLD) if attn_mask.dtype == torch.bool else attn_mask
        padding = None
        if key_padding_mask is not None:
            padding = self._padding(key_padding_mask, x_BLD.shape[0], grid[0] * grid[1], kept_BK)
        return self.norm_pre(x_BLD), Tokens(rope=rope, bias=bias, padding=padding)

    def _prefix(self) -> Tensor | None:
        """Class and register tokens [1, R, D]."""
        prefix: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        return torch.cat(prefix, dim=1) if prefix else None

    def positions(self, grid: tuple[int, int]) -> Tensor | None:
        """Position embeddings for this grid of patches, resampled where it is not the model's own."""
        if self.pos_embed is None or grid == self.patch_embed.grid_size:
            return self.pos_embed
        return resample_pos_embed(
            self.pos_embed, grid, self.patch_embed.grid_size, num_prefix_tokens=self.num_embedded_prefix_tokens
        )

    def _padding(self, mask: Tensor, images: int, patches: int, kept_BK: Tensor | None) -> Tensor:
        """key_padding_mask for all tokens that are left, [B, L]; prefix tokens are no padding unless it says so."""
        R = self.num_prefix_tokens
        if mask.dtype != torch.bool or tuple(mask.shape) not in ((images, patches), (images, R + patches)):
            raise ValueError(
                f"key_padding_mask must be bool of shape {(images, patches)} or {(images, R + patches)},"
                f" got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        if self.config.token_merging:
            raise ValueError("key_padding_mask does not go with token_merging: padding could merge into patches")
        if mask.shape[1] == patches:
            mask = F.pad(mask, (R, 0))
        if kept_BK is not None:
            mask = torch.cat([mask[:, :R], mask[:, R:].gather(1, kept_BK)], dim=1)
        return mask

    def run_block(self, number: int, block: Callable[..., Any], x: Tensor, tokens: Tokens) -> tuple[Tensor, Tokens]:
        """The tokens after one block."""
        told = self.told(number, tokens)
        args = (x,) if all(part is None for part in told) else (x, told)  # other people's blocks take x alone
        if self.recompute == "block" and torch.is_grad_enabled():
            out = checkpoint(block, *args, use_reentrant=False)  # keeps x and the RNG state, nothing inside
        else:
            out = block(*args)
        return (out[0], tokens._replace(size=out[1].size)) if isinstance(out, tuple) else (out, tokens)

    def told(self, number: int, tokens: Tokens) -> Tokens:
        """``tokens`` as block ``number`` gets them: learned rotations differ from layer to layer."""
        if tokens.rope is None or self.config.rope_type != "mixed":
            return tokens
        return tokens._replace(rope=tokens.rope.layer(number))

    # A file each: what looks inside, what takes images of several sizes at once, what changes the model.
    forward_intermediates = intermediates.forward_intermediates
    get_intermediate_layers = intermediates.get_intermediate_layers
    attention_maps = intermediates.attention_maps
    forward_packed = packed.forward_packed
    get_classifier = surgery.get_classifier
    reset_classifier = surgery.reset_classifier
    set_input_size = surgery.set_input_size
    prune_intermediate_layers = surgery.prune_intermediate_layers
    set_precision = surgery.set_precision
    set_grad_checkpointing = surgery.set_grad_checkpointing
    no_weight_decay = surgery.no_weight_decay
    group_matcher = surgery.group_matcher

    def pool(self, x_BLD: Tensor, tokens: Tokens = FULL) -> Tensor:
        """Tokens [B, L, D] to one vector per image [B, D]; with global_pool = "" the tokens as they are."""
        first = 0 if self.config.pool_include_prefix else self.num_prefix_tokens
        x_BND = x_BLD[:, first:]
        padding, size = (None if part is None else part[:, first:] for part in (tokens.padding, tokens.size))
        if self.attn_pool is not None:
            bias = None if size is None else size.log()
            return self.attn_pool(x_BND, bias if padding is None else additive(~padding, x_BND))
        if self.global_pool == "token":
            return x_BLD[:, 0]
        return pool_tokens(x_BND, self.global_pool, padding, size) if self.global_pool else x_BLD

    def _head(self, x_BLD: Tensor, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        x_BD = self.pre_logits(self.head_drop(self.fc_norm(self.pool(x_BLD, tokens))))
        return x_BD if pre_logits else self.head(x_BD)


def _blocks(config: ViTConfig) -> Iterator[nn.Module]:
    options: dict[str, Any] = {
        "qkv_bias": config.qkv_bias,
        "qkv_layout": config.qkv_layout,
        "qk_norm": config.qk_norm,
        "scale_attn_norm": config.scale_attn_norm,
        "scale_mlp_norm": config.scale_mlp_norm,
        "mlp_layer": config.mlp_layer,
        "activation": config.activation,
        "norm_eps": config.norm_eps,
        "init_values": config.init_values,
        "attn_drop": config.attn_drop_rate,
        "proj_drop": config.proj_drop_rate,
        "backend": config.backend,
        "recompute": config.block_recompute,
        "precision": config.precision,
    }
    kind: type[nn.Module] = BLOCKS[config.block]
    if config.token_merging:
        kind = MERGING_BLOCKS[config.block]
        options |= {"merge": config.token_merging, "prefix": config.num_prefix_tokens}
    for drop_path in drop_path_rates(config.drop_path_rate, config.depth):
        yield kind(config.embed_dim, config.num_heads, config.mlp_hidden, drop_path=drop_path, **options)


def _halves(blocks: Sequence[nn.Module]) -> list[Halves | None]:
    return [block.halves() if isinstance(block, Block) else None for block in blocks]


def _rotary_embedding(config: ViTConfig) -> RotaryEmbedding | None:
    if config.rope_type is None:
        return None
    return RotaryEmbedding(
        config.embed_dim // config.num_heads,
        kind=config.rope_type,
        temperature=config.rope_temperature,
        ref_grid=config.ref_grid,
        grid_offset=config.rope_grid_offset,
        grid_indexing=config.rope_grid_indexing,
        rotate_half=config.rope_rotate_half,
        shift=config.rope_shift_coords,
        jitter=config.rope_jitter_coords,
        rescale=config.rope_rescale_coords,
        depth=config.depth,
        num_heads=config.num_heads,
    )


def _representation(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc=nn.Linear(dim, hidden), act=nn.Tanh()))
