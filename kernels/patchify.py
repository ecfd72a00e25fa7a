"""Images to rows of pixels and back, projected patches to tokens: what a patch embedding needs around a product.

Legend: B images, C channels, P patch side, N = GY * GX patches of one image, K = C * P * P pixels of one patch in (c,
p, q) order, R prefix tokens, D width. Pixels are scaled and shifted per channel in fp32, then rounded to the product's
dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .configs import PATCHIFY


@triton.jit
def split_patch(m, GY, GX):
    """Image, grid row and grid column of patch m of the batch."""
    gx = m % GX
    rest = m // GX
    return rest // GY, rest % GY, gx


@triton.jit
def split_pixel(k, P: tl.constexpr):
    """Channel, row and column inside the patch of pixel k."""
    return k // (P * P), k // P % P, k % P


@triton.jit
def pixel_offsets(m, k, GY, GX, stride_b, stride_c, stride_y, stride_x, P: tl.constexpr):
    """Offsets [M, K] of pixels k of patches m in an image batch of any strides; int64, as a batch can pass 2**31
    pixels."""
    b, gy, gx = split_patch(m, GY, GX)
    c, p, q = split_pixel(k, P)
    corner = b.to(tl.int64) * stride_b + (gy * P).to(tl.int64) * stride_y + (gx * P).to(tl.int64) * stride_x
    return corner[:, None] + (c * stride_c + p * stride_y + q * stride_x)[None, :]


@triton.jit
def load_pixels(
    images, scale, shift, m, k, patches, GY, GX, stride_b, stride_c, stride_y, stride_x,
    K: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """fp32 pixels * scale + shift [M, K], 0 outside; FULL where every k is a pixel."""
    at = pixel_offsets(m, k, GY, GX, stride_b, stride_c, stride_y, stride_x, P)
    channel = k // (P * P)
    inside = (m < patches)[:, None]
    if FULL:
        gain = tl.load(scale + channel)
        level = tl.load(shift + channel)
    else:
        inside = inside & (k < K)[None, :]
        gain = tl.load(scale + channel, mask=k < K, other=0.0)
        level = tl.load(shift + channel, mask=k < K, other=0.0)
    pixels = tl.load(images + at, mask=inside, other=0).to(tl.float32)
    result = tl.fma(pixels, tl.broadcast_to(gain[None, :], pixels.shape), tl.broadcast_to(level[None, :], pixels.shape))
    return tl.where(inside, result, 0.0)


@triton.jit(do_not_specialize=["patches", "GY", "GX"])
def _patchify_kernel(
    images, scale, shift, out, patches, GY, GX, stride_b, stride_c, stride_y, stride_x,
    K: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    pixels = load_pixels(
        images, scale, shift, m, k, patches, GY, GX, stride_b, stride_c, stride_y, stride_x, K, P, False
    )
    mask = (m < patches)[:, None] & (k < K)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * K + k[None, :], pixels.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["patches", "GY", "GX"])
def _unpatchify_kernel(
    d_patches, scale, d_images, patches, GY, GX, stride_b, stride_c, stride_y,
    K: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (m < patches)[:, None] & (k < K)[None, :]
    gradient = tl.load(d_patches + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(scale + k // (P * P), mask=k < K, other=0.0)
    at = pixel_offsets(m, k, GY, GX, stride_b, stride_c, stride_y, 1, P)
    tl.store(d_images + at, (gradient * gain[None, :]).to(d_images.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "N"])
def _assemble_kernel(
    projected, bias, pos_embed, prefix, tokens, rows, N,
    D: tl.constexpr, R: tl.constexpr, PREFIX_POSITION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image = t // (R + N)
    place = t % (R + N)
    mask = (t < rows)[:, None] & (d < D)[None, :]
    is_patch = mask & (place >= R)[:, None]
    source = (image * N + place - R).to(tl.int64)[:, None] * D + d[None, :]
    value = tl.load(projected + source, mask=is_patch, other=0.0).to(tl.float32)
    if bias is not None:
        value = tl.where(is_patch, value + tl.load(bias + d, mask=d < D, other=0.0)[None, :], value)
    if prefix is not None:
        is_prefix = mask & (place < R)[:, None]
        value += tl.load(prefix + place[:, None] * D + d[None, :], mask=is_prefix, other=0.0)
    if pos_embed is not None:
        value += load_position(pos_embed, place, d, mask, is_patch, D, R, PREFIX_POSITION)
    tl.store(tokens + t.to(tl.int64)[:, None] * D + d[None, :], value.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def load_position(pos_embed, place, d, mask, is_patch, D: tl.constexpr, R: tl.constexpr, PREFIX_POSITION: tl.constexpr):
    """Position embedding of token `place` of an image; prefix tokens have one only under PREFIX_POSITION."""
    if PREFIX_POSITION:
        return tl.load(pos_embed + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    else:
        return tl.load(pos_embed + (place - R)[:, None] * D + d[None, :], mask=is_patch, other=0.0)


def patch_grid(images: torch.Tensor, patch: int) -> tuple[int, int, int]:
    """Patches of the batch, grid rows, grid columns."""
    GY, GX = images.shape[2] // patch, images.shape[3] // patch
    return images.shape[0] * GY * GX, GY, GX


@device.launcher
def patchify(images: torch.Tensor, patch: int, scale: torch.Tensor, shift: torch.Tensor, patches: torch.Tensor) -> None:
    """patches [B * N, C * P * P] = pixels * scale[c] + shift[c] of images [B, C, Hi, Wi], uint8 or float, any strides.

    The order of a row is (c, p, q).
    """
    rows, GY, GX = patch_grid(images, patch)
    if rows == 0:
        return
    K = patches.shape[1]
    config = PATCHIFY
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(K, config.columns))
    _patchify_kernel[grid](
        images, scale, shift, patches, rows, GY, GX, *images.stride(), K, patch, config.rows, config.columns,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )  # fmt: skip


@device.launcher
def unpatchify(d_patches: torch.Tensor, patch: int, scale: torch.Tensor, d_images: torch.Tensor) -> None:
    """d_images [B, C, Hi, Wi] contiguous = d_patches * scale[c]; pixels no patch covers get 0."""
    rows, GY, GX = patch_grid(d_images, patch)
    if (GY * patch, GX * patch) != d_images.shape[2:]:
        d_images.zero_()
    if rows == 0:
        return
    K = d_patches.shape[1]
    config = PATCHIFY
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(K, config.columns))
    _unpatchify_kernel[grid](
        d_patches, scale, d_images, rows, GY, GX, *d_images.stride()[:3], K, patch, config.rows, config.columns,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )  # fmt: skip


@device.launcher
def assemble_tokens(
    projected: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
    tokens: torch.Tensor,
) -> None:
    """tokens [B, R + N, D] from projected [B * N, D], bias [D], pos_embed [N or R + N, D] and prefix [R, D]."""
    B, L, D = tokens.shape
    if tokens.numel() == 0:
        return
    R = 0 if prefix is None else prefix.shape[0]
    config = PATCHIFY
    grid = (triton.cdiv(B * L, config.rows), triton.cdiv(D, config.columns))
    _assemble_kernel[grid](
        projected, bias, pos_embed, prefix, tokens, B * L, L - R, D, R,
        pos_embed is not None and pos_embed.shape[0] == L, config.rows, config.columns, num_warps=config.warps,
        enable_fp_fusion=True,
    )  # fmt: skip
