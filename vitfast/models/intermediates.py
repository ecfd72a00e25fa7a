"""What happens inside: outputs of chosen blocks, and attention maps while the kernels stay fused.

B images, N patches, R prefix tokens, L = R + N tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vitfast.models.config import check_choice

if TYPE_CHECKING:
    from vitfast.models.vit import VisionTransformer


def forward_intermediates(
    model: VisionTransformer,
    images_BCHW: Tensor,
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Any:
    """Outputs of chosen blocks, as timm gives them.

    indices: the last n blocks (int), these blocks (a sequence, negative from the end), or all (None).
    norm: apply the final norm to each. stop_early: run no block after the last chosen one.
    output_fmt: "NCHW" for maps [B, D, rows, columns] or "NLC" for tokens [B, N, D].
    attn_mask, key_padding_mask: as in ``forward``.
    Returns (final tokens, list), or the list alone with intermediates_only; each entry becomes a pair (patches,
    prefix tokens [B, R, D]) with return_prefix_tokens. With output_dict a dict of "image_intermediates",
    "image_intermediates_prefix" and "image_features". Raises ValueError for an index without a block, and for maps
    of tokens that are no longer a grid (token merging, patch dropout in training).
    """
    check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
    chosen = block_indices(len(model.blocks), indices)
    grid = model.patch_embed.grid_of(images_BCHW)
    x_BLD, tokens = model.start(images_BCHW, attn_mask, key_padding_mask)
    R = model.num_prefix_tokens
    if output_fmt == "NCHW" and (model.config.token_merging or x_BLD.shape[1] != R + grid[0] * grid[1]):
        raise ValueError("output_fmt must be 'NLC' where tokens are merged or dropped, got 'NCHW'")
    outputs = {}
    for i, block in enumerate(model.blocks):
        if stop_early and i > max(chosen):
            break
        x_BLD, tokens = model.run_block(i, block, x_BLD, tokens)
        if i in chosen:
            outputs[i] = model.norm(x_BLD) if norm else x_BLD
    prefixes = [outputs[i][:, :R] for i in chosen]
    patches = [outputs[i][:, R:] for i in chosen]
    if output_fmt == "NCHW":
        patches = [y_BND.transpose(1, 2).unflatten(2, grid).contiguous() for y_BND in patches]
    with_prefix = return_prefix_tokens and R > 0
    if output_dict:
        found: dict[str, Any] = {"image_intermediates": patches}
        if with_prefix:
            found["image_intermediates_prefix"] = prefixes
        return found if intermediates_only else found | {"image_features": model.norm(x_BLD)}
    intermediates: list = list(zip(patches, prefixes, strict=True)) if with_prefix else patches
    return intermediates if intermediates_only else (model.norm(x_BLD), intermediates)


def get_intermediate_layers(
    model: VisionTransformer,
    images_BCHW: Tensor,
    n: int | Sequence[int] = 1,
    reshape: bool = False,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    attn_mask: Tensor | None = None,
) -> list:
    """DINO's interface to ``forward_intermediates``: the last n blocks or the blocks n, as tokens or maps."""
    fmt = "NCHW" if reshape else "NLC"
    return model.forward_intermediates(
        images_BCHW, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True, attn_mask=attn_mask
    )


def attention_maps(
    model: VisionTransformer,
    images_BCHW: Tensor,
    layers: int | Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> dict[int, Tensor]:
    """The attention weights of chosen layers and heads, {layer: [B, heads, L, L] fp32}, rows summing to 1.

    The forward pass runs with its fused kernels, which never hold these; for each chosen layer q and k of the chosen
    heads are then projected again from the block's input. Nothing is computed after the last chosen layer.
    layers: as ``indices`` of ``forward_intermediates``. heads: numbers from 0 (negative from the end); None: all.
    Differentiable. Raises ValueError for a layer or head that is not there.
    """
    chosen = block_indices(len(model.blocks), layers, "layers")
    count = model.config.num_heads
    if heads is not None and (not len(heads) or not all(-count <= head < count for head in heads)):
        raise ValueError(f"heads must be numbers of 0..{count - 1} (or negative), got {list(heads)}")
    numbers = None if heads is None else [head % count for head in heads]
    x_BLD, tokens = model.start(images_BCHW, attn_mask, key_padding_mask)
    maps: dict[int, Tensor] = {}
    for i, block in enumerate(model.blocks):
        if i in chosen:
            maps[i] = block.attn.maps(block.norm1(x_BLD), model.told(i, tokens), numbers)  # type: ignore[union-attr, operator]
        if i == max(chosen):
            break
        x_BLD, tokens = model.run_block(i, block, x_BLD, tokens)
    return {i: maps[i] for i in chosen}


def block_indices(depth: int, indices: int | Sequence[int] | None, argument: str = "indices") -> list[int]:
    """Block numbers from 0: the last n (int), these (negative from the end), or all (None). Raises ValueError."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"{argument} must be between 1 and the number of blocks {depth}, got {indices}")
        return list(range(depth - indices, depth))
    chosen = [depth + i if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < depth for i in chosen):
        raise ValueError(f"{argument} must name blocks of 0..{depth - 1} (or negative), got {list(indices)}")
    return chosen
