"""Patch embedding as one matrix product that reads the images itself (implicit im2col), forward and backward.

Legend in patchify.py, with m a patch of the batch, k a pixel of a patch, d a column of the width. The forward's
epilogue adds bias and position and stores token-major [B, R + N, D]; programs past the product's write the prefix
tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import device
from .configs import patch_embed_config, patch_image_config, patch_weight_config
from .patchify import assemble_tokens, load_pixels, load_position, patch_grid, patchify, pixel_offsets, unpatchify
from .reduce import sum_partials

__all__ = [
    "assemble_tokens",
    "patch_embed_forward",
    "patch_embed_image_gradient",
    "patch_embed_weight_gradient",
    "patchify",
    "unpatchify",
]

TRITON_TYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _store_prefix(
    pos_embed, prefix, tokens, block, images, N, D: tl.constexpr, R: tl.constexpr,
    PREFIX_POSITION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M prefix tokens (of B * R) by BLOCK_D columns."""
    r = block // COLUMN_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    d = block % COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    place = r % R
    mask = (r < images * R)[:, None] & (d < D)[None, :]
    value = tl.load(prefix + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    if PREFIX_POSITION:
        value += tl.load(pos_embed + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    row = (r // R).to(tl.int64) * (R + N) + place
    tl.store(tokens + row[:, None] * D + d[None, :], value.to(tokens.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images_in_batch", "GY", "GX"])
def _forward_kernel(
    images, weight, bias, pos_embed, prefix, scale, shift, tokens, images_in_batch, GY, GX,
    stride_b, stride_c, stride_y, stride_x,
    K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PREFIX_POSITION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N = GY * GX
    patches = images_in_batch * N
    COLUMN_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    product_blocks = tl.cdiv(patches, BLOCK_M) * COLUMN_BLOCKS
    # Column blocks run fastest: the programs that read one block of patches run together and share it in L2.
    block = tl.program_id(0)
    if block >= product_blocks:
        if R > 0:
            _store_prefix(
                pos_embed, prefix, tokens, block - product_blocks, images_in_batch, N, D, R, PREFIX_POSITION,
                BLOCK_M, BLOCK_D, COLUMN_BLOCKS,
            )  # fmt: skip
    else:
        m = block // COLUMN_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
        d = block % COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            pixels = load_pixels(
                images, scale, shift, m, k, patches, GY, GX, stride_b, stride_c, stride_y, stride_x, K, P,
                K % BLOCK_K == 0,
            )  # fmt: skip
            w = tl.load(weight + d[:, None] * K + k[None, :], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(pixels.to(w.dtype), tl.trans(w), total, input_precision=PRECISION)
        mask = (m < patches)[:, None] & (d < D)[None, :]
        place = R + m % N
        if bias is not None:
            total += tl.load(bias + d, mask=d < D, other=0.0)[None, :]
        if pos_embed is not None:
            total += load_position(pos_embed, place, d, mask, mask, D, R, PREFIX_POSITION)
        row = (m // N).to(tl.int64) * (R + N) + place
        tl.store(tokens + row[:, None] * D + d[None, :], total.to(tokens.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images_in_batch", "GY", "GX"])
def _weight_kernel(
    images, d_tokens, scale, shift, partials, images_in_batch, GY, GX, stride_b, stride_c, stride_y, stride_x,
    K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """partials [G, D, K]: program (tile, g) sums d_tokens^T pixels over every G-th block of patches."""
    N = GY * GX
    patches = images_in_batch * N
    COLUMN_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    d = tl.program_id(0) // COLUMN_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    total = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for block in range(part, tl.cdiv(patches, BLOCK_M), tl.num_programs(1)):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        pixels = load_pixels(
            images, scale, shift, m, k, patches, GY, GX, stride_b, stride_c, stride_y, stride_x, K, P, False
        )
        row = (m // N).to(tl.int64) * (R + N) + R + m % N
        mask = (m < patches)[:, None] & (d < D)[None, :]
        gradient = tl.load(d_tokens + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(TYPE)
        total = tl.dot(tl.trans(gradient), pixels.to(TYPE), total, input_precision=PRECISION)
    at = part.to(tl.int64) * (D * K) + d[:, None] * K + k[None, :]
    tl.store(partials + at, total, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["images_in_batch", "GY", "GX"])
def _image_kernel(
    d_tokens, weight, scale, d_images, images_in_batch, GY, GX, stride_b, stride_c, stride_y,
    K: tl.constexpr, P: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_images: (d_tokens weight) * scale, each pixel written once, by the patch that covers it."""
    N = GY * GX
    patches = images_in_batch * N
    COLUMN_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    m = tl.program_id(0) // COLUMN_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    row = (m // N).to(tl.int64) * (R + N) + R + m % N
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = (m < patches)[:, None] & (d < D)[None, :]
        gradient = tl.load(d_tokens + row[:, None] * D + d[None, :], mask=mask, other=0.0)
        w = tl.load(weight + d[:, None] * K + k[None, :], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(gradient.to(w.dtype), w, total, input_precision=PRECISION)
    gain = tl.load(scale + k // (P * P), mask=k < K, other=0.0)
    at = pixel_offsets(m, k, GY, GX, stride_b, stride_c, stride_y, 1, P)
    mask = (m < patches)[:, None] & (k < K)[None, :]
    tl.store(d_images + at, (total * gain[None, :]).to(d_images.dtype.element_ty), mask=mask)


@device.launcher
def patch_embed_forward(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pos_embed: torch.Tensor | None,
    prefix: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """tokens [B, R + N, D] of images [B, C, Hi, Wi] (uint8 or float, any strides) and weight [D, C, P, P] contiguous.

    The product runs in the weight's dtype on pixels * scale[c] + shift[c]; bias [D], pos_embed [N or R + N, D], prefix
    [R, D], scale and shift [C] are fp32.
    """
    if tokens.numel() == 0:
        return
    B, L, D = tokens.shape
    P = weight.shape[-1]
    K = weight.numel() // D
    patches, GY, GX = patch_grid(images, P)
    R = L - GY * GX
    precision = device.dot_precision(weight.dtype)
    config = patch_embed_config(D, K, weight.dtype, precision, device.device_properties(images.device).arch)
    columns = triton.cdiv(D, config.columns)
    grid = ((triton.cdiv(patches, config.rows) + triton.cdiv(B * R, config.rows)) * columns,)
    _forward_kernel[grid](
        images, weight, bias, pos_embed, prefix, scale, shift, tokens, B, GY, GX, *images.stride(), K, P, D, R,
        pos_embed is not None and pos_embed.shape[0] == L and R > 0, config.rows, config.columns, config.depth,
        precision, num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers, enable_fp_fusion=True,
    )  # fmt: skip


@device.launcher
def patch_embed_weight_gradient(
    images: torch.Tensor,
    d_tokens: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    product_dtype: torch.dtype,
    d_weight: torch.Tensor,
) -> None:
    """d_weight [D, C, P, P] fp32 from d_tokens [B, R + N, D] contiguous, both operands rounded to product_dtype."""
    B, L, D = d_tokens.shape
    P = d_weight.shape[-1]
    K = d_weight.numel() // D
    patches, GY, GX = patch_grid(images, P)
    if patches == 0:
        d_weight.zero_()
        return
    chip = device.device_properties(images.device)
    precision = device.dot_precision(product_dtype)
    config = patch_weight_config(D, K, images.dtype == torch.float32, product_dtype, precision, chip.arch)
    tiles = triton.cdiv(D, config.rows) * triton.cdiv(K, config.columns)
    parts = max(1, min(triton.cdiv(patches, config.depth), 2 * chip.multiprocessors // tiles))
    partials = d_weight if parts == 1 else d_weight.new_empty(1, parts, D * K)
    _weight_kernel[(tiles, parts)](
        images, d_tokens, scale, shift, partials, B, GY, GX, *images.stride(), K, P, D, L - GY * GX,
        config.rows, config.columns, config.depth, precision, TRITON_TYPE[product_dtype],
        num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers, enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        sum_partials(partials, d_weight)


@device.launcher
def patch_embed_image_gradient(
    d_tokens: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, d_images: torch.Tensor
) -> None:
    """d_images [B, C, Hi, Wi] contiguous from d_tokens [B, R + N, D]; pixels no patch covers get 0."""
    B, L, D = d_tokens.shape
    P = weight.shape[-1]
    K = weight.numel() // D
    patches, GY, GX = patch_grid(d_images, P)
    if d_images.shape[2:] != (GY * P, GX * P):
        d_images.zero_()
    if patches == 0:
        return
    precision = device.dot_precision(weight.dtype)
    config = patch_image_config(K, D, weight.dtype, precision, device.device_properties(d_images.device).arch)
    grid = (triton.cdiv(patches, config.rows) * triton.cdiv(K, config.columns),)
    _image_kernel[grid](
        d_tokens, weight, scale, d_images, B, GY, GX, *d_images.stride()[:3], K, P, D, L - GY * GX,
        config.rows, config.columns, config.depth, precision,
        num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.registers, enable_fp_fusion=True,
    )  # fmt: skip
