"""The Vision Transformer in plain PyTorch, on the parameters of ours: what the fast one must match and is timed against.

B images, L tokens, D width, H heads, E head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast.layers.attention_pool import AttentionPoolLatent
from vitfast.layers.block import Block
from vitfast.layers.layer_scale import LayerScale
from vitfast.layers.mlp import Mlp
from vitfast.models.vit import VisionTransformer
from vitfast.ops.compose import activation_ref
from vitfast.ops.patch_embed import patch_embed_ref


def reference_forward(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """The model's logits [B, K] by PyTorch's own conv2d, layer_norm, linear, scaled_dot_product_attention and gelu.

    Differentiable in the model's parameters, in whatever dtype they have: fp64 gives the truth. There is no dropout and
    no DropPath here: compare in eval mode, or with their rates at 0.
    """
    embed = model.patch_embed
    tokens: list[Tensor] = [token for token in (model.cls_token, model.reg_token) if token is not None]
    x_BLD = patch_embed_ref(
        images_BCHW,
        embed.proj.weight,
        embed.proj.bias,
        pos_embed=model.pos_embed,
        prefix=torch.cat(tokens, dim=1) if tokens else None,
        mean=embed.mean,
        std=embed.std,
    )
    x_BLD = _norm(model.norm_pre, x_BLD)
    for block in model.blocks:
        assert isinstance(block, Block)
        x_BLD = x_BLD + _scaled(block.ls1, _attention(block, _norm(block.norm1, x_BLD)))
        x_BLD = x_BLD + _scaled(block.ls2, _mlp(block.mlp, _norm(block.norm2, x_BLD)))
    x_BLD = _norm(model.norm, x_BLD)
    pooled = model.pool(x_BLD) if model.attn_pool is None else _attention_pool(model.attn_pool, x_BLD)
    return model.head(model.pre_logits(_norm(model.fc_norm, pooled)))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return x
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _scaled(layer_scale: nn.Module, x: Tensor) -> Tensor:
    return x * layer_scale.gamma if isinstance(layer_scale, LayerScale) else x


def _attention(block: Block, x_BLD: Tensor) -> Tensor:
    attn = block.attn
    qkv_BL3HE = attn.qkv(x_BLD).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q_BHLE, k_BHLE, v_BHLE = qkv_BL3HE.permute(2, 0, 3, 1, 4).unbind(0)
    out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE)
    return attn.proj(out_BHLE.transpose(1, 2).flatten(2))


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(activation_ref(mlp.fc1(x), mlp.activation))


def _attention_pool(pool: AttentionPoolLatent, x_BLD: Tensor) -> Tensor:
    heads = (pool.num_heads, pool.head_dim)
    q_BH1E = pool.q(pool.latent).expand(x_BLD.shape[0], -1, -1).unflatten(-1, heads).transpose(1, 2)
    k_BHLE, v_BHLE = pool.kv(x_BLD).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
    pooled_BD = pool.proj(F.scaled_dot_product_attention(q_BH1E, k_BHLE, v_BHLE).flatten(1))
    return pooled_BD + _mlp(pool.mlp, _norm(pool.norm, pooled_BD))
