"""The Vision Transformer in plain PyTorch, on the parameters of ours: what the fast one must match and is timed against.

B images, L tokens, D width, H heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.layers.attention import Attention
from vitfast.layers.attention_pool import AttentionPoolLatent
from vitfast.layers.block import Block
from vitfast.layers.mlp import Mlp
from vitfast.layers.token_merging import MergingBlock
from vitfast.layers.tokens import Rope
from vitfast.models.pooling import pool_tokens
from vitfast.models.vit import VisionTransformer
from vitfast.ops.compose import activation_ref
from vitfast.ops.patch_embed import patch_embed_ref


def reference_forward(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """The model's logits [B, K] by PyTorch's own conv2d, layer_norm, linear, scaled_dot_product_attention and gelu.

    Differentiable in the model's parameters, in whatever dtype they have: fp64 gives the truth. There is no dropout and
    no DropPath here: compare in eval mode, or with their rates at 0. Raises ValueError for token merging, which is not
    plain.
    """
    embed, grid = model.patch_embed, model.patch_embed.grid_of(images_BCHW)
    tokens: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
    x_BLD = patch_embed_ref(
        images_BCHW,
        embed.proj.weight,
        embed.proj.bias,
        pos_embed=model.positions(grid),
        prefix=torch.cat(tokens, dim=1) if tokens else None,
        mean=embed.mean,
        std=embed.std,
    )
    x_BLD = _norm(model.norm_pre, x_BLD)
    rope = None if model.rope is None else model.rope(grid, images_BCHW.device)
    for i, block in enumerate(model.blocks):
        if not isinstance(block, Block) or isinstance(block, MergingBlock):
            raise ValueError(f"there is no plain reference for {type(block).__name__}")
        layer_rope = rope.layer(i) if rope is not None and model.config.rope_type == "mixed" else rope
        scale1, scale2 = block.scales()
        x_BLD = x_BLD + _scaled(scale1, _attention(block.attn, _norm(block.norm1, x_BLD), layer_rope))
        x_BLD = x_BLD + _scaled(scale2, _mlp(block.mlp, _norm(block.norm2, x_BLD)))
    x_BLD = _norm(model.norm, x_BLD)
    return model.head(model.pre_logits(_norm(model.fc_norm, _pool(model, x_BLD))))


def _pool(model: VisionTransformer, x_BLD: Tensor) -> Tensor:
    pooled = x_BLD if model.config.pool_include_prefix else x_BLD[:, model.num_prefix_tokens :]
    if model.attn_pool is not None:
        return _attention_pool(model.attn_pool, pooled)
    if model.global_pool == "token":
        return x_BLD[:, 0]
    return pool_tokens(pooled, model.global_pool, None, None) if model.global_pool else x_BLD


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else x * scale


def _attention(attn: Attention, x_BLD: Tensor, rope: Rope | None) -> Tensor:
    qkv_BL3HE = F.linear(x_BLD, *attn.qkv_parameters()).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q_BLHE, k_BLHE, v_BLHE = qkv_BL3HE.unbind(2)
    q_BLHE, k_BLHE = _norm(attn.q_norm, q_BLHE), _norm(attn.k_norm, k_BLHE)
    if rope is not None:
        q_BLHE, k_BLHE = rope.rotate(q_BLHE), rope.rotate(k_BLHE)
    q_BHLE, k_BHLE, v_BHLE = (x.transpose(1, 2) for x in (q_BLHE, k_BLHE, v_BLHE))
    out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)
    return attn.proj(_norm(attn.norm, out_BHLE.transpose(1, 2).flatten(2)))


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    hidden = activation_ref(F.linear(x, *mlp.hidden_parameters()), mlp.activation)
    return mlp.fc2(_norm(mlp.norm, hidden))


def _attention_pool(pool: AttentionPoolLatent, x_BLD: Tensor) -> Tensor:
    heads = (pool.num_heads, pool.head_dim)
    q_BH1E = pool.q(pool.latent).expand(x_BLD.shape[0], -1, -1).unflatten(-1, heads).transpose(1, 2)
    k_BHLE, v_BHLE = pool.kv(x_BLD).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    pooled_BD = pool.proj(F.scaled_dot_product_attention(q_BH1E, k_BHLE, v_BHLE).flatten(1))
    return pooled_BD + _mlp(pool.mlp, _norm(pool.norm, pooled_BD))
